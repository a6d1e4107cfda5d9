// Histograms and the strip below them, as SVG that takes its colours from the style sheet.

const SVG = "http://www.w3.org/2000/svg";
const PLOT = { width: 300, left: 8, right: 8, top: 8, axis: 20 };

function draw(parent, tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

/** About `count` round numbers in [low, high]. */
function ticks(low, high, count = 4) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  if (!(last >= first)) return [low];
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** A range that holds all finite numbers, with a margin; never empty. */
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [0, 1];
  const margin = (high - low) * 0.04 || Math.abs(low) * 0.01 || 1e-3;
  return [low - margin, high + margin];
}

function binned(values, low, high, bins) {
  const counts = new Array(bins).fill(0);
  for (const value of values) {
    if (Number.isFinite(value)) counts[Math.min(bins - 1, Math.floor((value - low) / (high - low) * bins))]++;
  }
  return counts;
}

/** Puts a mark at `at` of a plot whose axis lies at `base`: a triangle on the axis for a sample, a line for others. */
function markValue(mark, kind, at, base) {
  mark.setAttribute("visibility", Number.isFinite(at) ? "visible" : "hidden");
  if (!Number.isFinite(at)) return;
  const shape = kind === "sample" ? { d: `M${at} ${base - 9} l-5 9 h10 z` } : { x1: at, x2: at, y1: 1, y2: base };
  for (const [name, value] of Object.entries(shape)) mark.setAttribute(name, value);
}

/**
 * A histogram of `values` with a shaded band and marked values.
 *
 * marks: [{ kind, value }], kind a class of the style sheet; not seen where the value is not finite. The plot's
 * mark(kind, value) moves one of them.
 */
function histogram({ values, marks = [], band = null, height = 120, label, tone = "" }) {
  const [low, high] = extent([...values, ...marks.map((mark) => mark.value), ...(band ?? [])]);
  const base = height - PLOT.axis, span = PLOT.width - PLOT.left - PLOT.right;
  const x = (value) => PLOT.left + (value - low) / (high - low) * span;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${PLOT.width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  svg.setAttribute("class", `histogram ${tone}`);
  if (band) {
    draw(svg, "rect", { class: "band", x: x(band[0]), width: x(band[1]) - x(band[0]), y: 0, height: base });
  }
  // The rule of Rice, over the samples' own range, so that the marks do not blur them.
  const [first, last] = extent(values);
  const bins = Math.max(5, Math.min(40, Math.round(2 * Math.cbrt(values.length)) + 2));
  const counts = binned(values, first, last, bins);
  const most = Math.max(1, ...counts), step = (x(last) - x(first)) / bins;
  counts.forEach((count, i) => {
    if (!count) return;
    const size = count / most * (base - PLOT.top);
    const wide = Math.max(step - (step > 4 ? 1 : 0), 0.75);
    const bin = draw(svg, "rect", { class: "bin", x: x(first) + i * step, width: wide, y: base - size, height: size });
    const [from, to] = [i, i + 1].map((edge) => written(first + edge / bins * (last - first), 3));
    draw(bin, "title", {}, `${count} from ${from} to ${to}`);
  });
  draw(svg, "line", { class: "axis", x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: base, y2: base });
  for (const tick of ticks(low, high)) {
    draw(svg, "line", { class: "axis", x1: x(tick), x2: x(tick), y1: base, y2: base + 3 });
    const text = draw(svg, "text", { x: x(tick), y: height - 4 }, written(tick));
    const edge = text.textContent.length * 3.2; // half of its width: the outer labels stay inside
    text.setAttribute("x", Math.min(PLOT.width - edge, Math.max(edge, x(tick))));
  }
  svg.mark = (kind, value) => markValue(svg.querySelector(`.mark.${kind}`), kind, x(value), base);
  for (const { kind, value } of marks) {
    draw(svg, kind === "sample" ? "path" : "line", { class: `mark ${kind}` });
    svg.mark(kind, value);
  }
  return svg;
}

/** Where the band lies in the whole scale of the image: how much of the scale the posterior leaves open. */
function strip({ low, high }, band, label) {
  const svg = document.createElementNS(SVG, "svg");
  const clamp = (value) => Math.min(1, Math.max(0, (value - low) / (high - low))) * PLOT.width;
  svg.setAttribute("viewBox", `0 0 ${PLOT.width} 10`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  svg.setAttribute("class", "strip");
  draw(svg, "rect", { class: "whole", x: 0, width: PLOT.width, y: 3, height: 4, rx: 2 });
  const [left, right] = band.map(clamp);
  const wide = Math.max(3, right - left);
  draw(svg, "rect", { class: "part", x: Math.min(left, PLOT.width - wide), width: wide, y: 1, height: 8, rx: 2 });
  return svg;
}
