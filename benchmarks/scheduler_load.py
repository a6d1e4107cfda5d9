"""The scheduler: throughput by batch size, a mixed load together and one by one, and what the loop costs.

    python -m benchmarks.scheduler_load [--prior fashion-28] [--device cpu] [--requests 50]

prints the tables of docs/scheduler.md.
"""

import argparse
import random
import time
from collections.abc import Iterator

import torch

from alpenglow.loading import load_prior
from alpenglow.operators import Denoising, GaussianBlur, Inpainting
from alpenglow.priors.batched import BatchedPrior
from alpenglow.scheduler.core import Core, Work
from alpenglow.scheduler.request import Request, make_request

NOISE_STD = 0.05
BATCHES = (1, 4, 16, 64)


def request(prior: BatchedPrior, seed: int, num_samples: int, levels: int) -> Request:
    """ALPS, which has no pilot, on one of three operators: num_samples * levels * 5 NFE."""
    shape = prior.image_shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape[1:], generator=generator) < 0.5
    operator = (Inpainting(mask), GaussianBlur(1.5), Denoising())[seed % 3]
    y = operator.forward(torch.rand(1, *shape, generator=generator) * 2 - 1)
    return make_request(
        prior, operator, y,
        noise_std=NOISE_STD, num_samples=num_samples, method="alps", levels=levels, seed=seed,
    )  # fmt: skip


def mixed_load(prior: BatchedPrior, count: int) -> Iterator[Request]:
    """Requests of 1 to 32 samples and 5 to 15 NFE each."""
    chance = random.Random(0)
    for seed in range(count):
        yield request(prior, seed, chance.randint(1, 32), chance.randint(1, 3))


def serve(requests: list[Request]) -> Work:
    """All of them at once."""
    core = Core()
    for one in requests:
        core.queue(core.make(one))
    while core.turn():
        pass
    return core.work


def throughput(prior: BatchedPrior) -> list[str]:
    """NFE a second, and what the loop takes of an iteration, by batch of the network."""
    lines = [
        "| batch | NFE a second | samples a second (100 NFE) | network | chains | loop |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for batch in BATCHES:
        sized = prior.with_batch_size(batch)
        serve([request(sized, 0, batch, 1)])  # warm
        work = serve([request(sized, 0, max(16, batch), 2)])
        rate = work.rows / work.seconds
        loop = work.seconds - work.prior_seconds - work.chain_seconds
        shares = [f"{part / work.seconds:.2%}" for part in (work.prior_seconds, work.chain_seconds, loop)]
        lines.append(f"| {batch} | {rate:.0f} | {rate / 100:.2f} | {' | '.join(shares)} |")
        print(lines[-1], flush=True)
    return lines


def load(prior: BatchedPrior, count: int) -> list[str]:
    """The mixed load together, and one request after the other."""
    requests = list(mixed_load(prior, count))
    serve(requests[:1])
    together = serve(requests)
    began = time.perf_counter()
    single = [serve([one]) for one in requests]
    seconds = time.perf_counter() - began
    rows, slots = sum(work.rows for work in single), sum(work.slots for work in single)
    return [
        f"| {count} requests, {together.rows} NFE | batches | slot occupancy | seconds |",
        "| --- | --- | --- | --- |",
        f"| together | {together.batches} | {together.rows / together.slots:.1%} | {together.seconds:.1f} |",
        f"| one after the other | {slots // prior.batch_size} | {rows / slots:.1%} | {seconds:.1f} |",
        "",
        f"Together {seconds / together.seconds:.2f} times as fast.",
    ]


def tables(prior: BatchedPrior, count: int = 50) -> list[str]:
    """Everything, as lines of Markdown."""
    head = f"{prior.name} on {prior.device}, {torch.get_num_threads()} threads, torch {torch.__version__}."
    return [head, "", *throughput(prior), "", *load(prior, count)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="fashion-28")
    parser.add_argument("--device", default=None)
    parser.add_argument("--requests", type=int, default=50)
    options = parser.parse_args()
    prior = load_prior(options.prior, device=options.device)
    print("\n".join(tables(prior, options.requests)))


if __name__ == "__main__":
    main()
