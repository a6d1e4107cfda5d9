// Declarations alone of what the example in docs/export.md calls, after the interface of TensorRT 10, for a
// compiler's check where NVIDIA's own headers are missing. It is none of theirs, and nothing links to it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace nvinfer1 {

struct Dims {
    int32_t nbDims;
    int64_t d[8];
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual void log(Severity severity, char const* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() noexcept = default;
    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept;
    bool setInputShape(char const* tensor, Dims const& dims) noexcept;
    bool setTensorAddress(char const* tensor, void* data) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;
};

enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC };

class ICudaEngine {
public:
    virtual ~ICudaEngine() noexcept = default;
    IExecutionContext* createExecutionContext(
        ExecutionContextAllocationStrategy strategy = ExecutionContextAllocationStrategy::kSTATIC) noexcept;
};

class IRuntime {
public:
    virtual ~IRuntime() noexcept = default;
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept;
};

IRuntime* createInferRuntime(ILogger& logger);

}  // namespace nvinfer1
