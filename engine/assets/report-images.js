// What each view shows: images in grey, colour or by phase, and maps of the spread, on shared scales.

const SPREAD = combine(MAPS.std ?? new Float32Array(CHANNELS * PIXELS));
const ERROR = MAPS.truth && combine(MAPS.mean.map((value, i) => value - MAPS.truth[i]));
const WIDTH_IN_STD = 2 * (DATA.halfWidthInStd ?? 0);
const LEVEL_NAME = `${Math.round(100 * DATA.level)} %`;
const element = (id) => document.getElementById(id);

function usualScale() {
  const images = [MAPS.mean, MAPS.truth].filter(Boolean);
  let low = Infinity, high = -Infinity;
  for (const image of images) {
    for (let i = 0; i < PIXELS; i++) {
      const value = scalar(image, i, "magnitude");
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  // The top half percent would darken everything else for a few stray pixels.
  const spread = quantile([...SPREAD, ...(ERROR ?? [])], 0.995) || 1;
  if (COLOUR) [low, high] = [-1, 1]; // the range of natural images, so that colours stay true
  if (COMPLEX) low = 0;
  return { low, high: high > low ? high : low + 1, spread };
}

const SCALE = usualScale();
const state = {
  pixel: SPREAD.indexOf(SPREAD.reduce((a, b) => Math.max(a, b), 0)), // the least certain one
  held: false,
  sample: 0,
  quantity: "magnitude",
  region: WHOLE,
  scale: { ...SCALE },
};

function imagePaint(image) {
  return ({ scale, quantity }) => {
    const values = typeof image === "function" ? image() : image;
    const range = [scale.low, scale.high];
    if (COLOUR) return { bytes: rgb(values, range), table: null };
    const shown = Float32Array.from({ length: PIXELS }, (_, i) => scalar(values, i, quantity));
    if (quantity === "phase") {
      // Where there is no signal the phase is noise: it fades into grey below a tenth of the scale.
      const alpha = (i) => 255 * Math.min(1, scalar(values, i, "magnitude") / (0.1 * SCALE.high));
      const circle = [-Math.PI, Math.PI];
      return { bytes: coloured(shown, COLOURS.phase, circle, alpha), table: COLOURS.phase, range: circle, unit: "rad" };
    }
    return { bytes: coloured(shown, COLOURS.grey, range), table: COLOURS.grey, range };
  };
}

function imageValue(value) {
  return (pixel, { quantity }) => {
    if (COLOUR) return ""; // three numbers are for the read-out
    if (!COMPLEX) return written(value(pixel));
    const [re, im] = [value(pixel), value(PIXELS + pixel)];
    return quantity === "phase" ? `${written(Math.atan2(im, re), 3)} rad` : written(Math.hypot(re, im));
  };
}

function imageView(key, title, image) {
  return { key, title, paint: imagePaint(image), at: imageValue((i) => image[i]) };
}

function spreadView(key, title, meaning, map, factor = 1) {
  const paint = ({ scale }) => {
    const range = [0, factor * scale.spread];
    return { bytes: coloured(map, COLOURS.spread, range), table: COLOURS.spread, range };
  };
  return { key, title, meaning, paint, at: (pixel) => written(map[pixel]) };
}

let currentSample = SAMPLES && sampleImage(0);
const sampleView = {
  key: "sample",
  title: "Sample",
  paint: imagePaint(() => currentSample),
  at: imageValue((i) => currentSample[i]),
};

const views = [
  imageView("mean", "Mean", MAPS.mean),
  MAPS.std && spreadView("std", "Std", "Standard deviation", SPREAD),
  DATA.halfWidthInStd !== null && spreadView("width", `${LEVEL_NAME} width`, `Width of the ${LEVEL_NAME} interval`,
    combine(MAPS.std, WIDTH_IN_STD), WIDTH_IN_STD),
  SAMPLES && sampleView,
  MAPS.map && imageView("map", "MAP", MAPS.map),
  MAPS.truth && imageView("truth", "Truth", MAPS.truth),
  ERROR && spreadView("error", "Error", "Absolute error of the mean, |mean − truth|", ERROR),
].filter(Boolean).map((description) => new View(element("views"), description));
