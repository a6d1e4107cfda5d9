// The numbers of the page: decoded arrays, what is derived from them, and how they are written.

const DATA = JSON.parse(document.getElementById("data").textContent);
const [CHANNELS, HEIGHT, WIDTH] = DATA.shape;
const PIXELS = HEIGHT * WIDTH;
const COMPLEX = CHANNELS === 2, COLOUR = CHANNELS === 3;
const PART_NAMES = { 1: [""], 2: ["real", "imag."], 3: ["red", "green", "blue"] }[CHANNELS];

function decode(text, Type) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Type(bytes.buffer);
}

const MAPS = Object.fromEntries(
  Object.entries(DATA.maps).map(([name, text]) => [name, decode(text, Float32Array)]));
const ENERGY = decode(DATA.energy, Float32Array);
const COLOURS = {
  spread: decode(DATA.colours.spread, Uint8Array),
  phase: decode(DATA.colours.phase, Uint8Array),
  grey: Uint8Array.from({ length: 768 }, (_, i) => Math.floor(i / 3)),
};
const SAMPLES = DATA.samples && { ...DATA.samples, codes: decode(DATA.samples.codes, Int8Array) };

/** The value of sample `n` at place `i` of [C, H, W]. */
function sampleValue(n, i) {
  const code = SAMPLES.codes[n * CHANNELS * PIXELS + i];
  return code ? MAPS.mean[i] + MAPS.std[i] * SAMPLES.step * code : MAPS.mean[i];
}

/** Sample `n` as an image [C, H, W]. */
function sampleImage(n) {
  return Float32Array.from({ length: CHANNELS * PIXELS }, (_, i) => sampleValue(n, i));
}

/** Bounds of the predictive interval at place `i`, or null where one sample says nothing of the spread. */
function interval(i) {
  if (DATA.halfWidthInStd === null) return null;
  const half = DATA.halfWidthInStd * MAPS.std[i];
  return [MAPS.mean[i] - half, MAPS.mean[i] + half];
}

/** A scalar of an image [C, H, W] at a pixel: grey value, or magnitude or phase of a complex value. */
function scalar(image, pixel, quantity) {
  if (!COMPLEX) return image[pixel];
  const [re, im] = [image[pixel], image[PIXELS + pixel]];
  return quantity === "phase" ? Math.atan2(im, re) : Math.hypot(re, im);
}

/** A deviation [C, H, W] as one map [H, W]: root sum of squares of complex parts, root mean square of colours. */
function combine(deviation, factor = 1) {
  const weight = COLOUR ? 1 / CHANNELS : 1;
  return Float32Array.from({ length: PIXELS }, (_, pixel) => {
    let sum = 0;
    for (let c = 0; c < CHANNELS; c++) sum += deviation[c * PIXELS + pixel] ** 2;
    return factor * Math.sqrt(weight * sum);
  });
}

/** A diagnostic [C, H, W] as one map [H, W]: the worst of the channels. */
function worst(values, better) {
  return Float32Array.from({ length: PIXELS }, (_, pixel) => {
    let found = values[pixel];
    for (let c = 1; c < CHANNELS; c++) {
      const other = values[c * PIXELS + pixel];
      found = better === "high" ? Math.min(found, other) : Math.max(found, other);
    }
    return found;
  });
}

/** The q-quantile of numbers, linear between order statistics; those that are not finite do not count. */
function quantile(values, q) {
  const sorted = Float64Array.from(values).filter(Number.isFinite).sort();
  if (!sorted.length) return NaN;
  const place = q * (sorted.length - 1), low = Math.floor(place);
  return sorted[low] + (place - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

/** A number with at most `digits` significant digits and a true minus sign. */
function written(value, digits = 4) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "–" : value > 0 ? "∞" : "−∞";
  const rounded = Number(value.toPrecision(digits));
  const size = Math.abs(rounded);
  const text = size && (size < 1e-4 || size >= 1e6) ? rounded.toExponential() : String(rounded);
  return text.replaceAll("-", "−");
}
