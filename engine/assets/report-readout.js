// The read-out of the marked pixel: its numbers, and its marginal as a histogram.

const SHORT = { r_hat: "R-hat", ess: "ESS", mcse: "MCSE" };
const DIGITS = CHANNELS > 1 ? 3 : 4; // what columns side by side have room for
const narrow = matchMedia("(max-width: 899px)"); // as in the style sheet
element("pixel").classList.toggle("colour", COLOUR);

function row(name, cells, head = false) {
  const line = document.createElement("tr");
  line.dataset.row = name;
  for (const [i, text] of [name, ...cells].entries()) {
    const cell = document.createElement(head || i === 0 ? "th" : "td");
    if (head || i === 0) cell.scope = head ? "col" : "row";
    cell.textContent = text;
    line.append(cell);
  }
  return line;
}

function showValues() {
  const places = PART_NAMES.map((_, c) => c * PIXELS + state.pixel);
  const lines = [];
  const add = (name, map) => map && lines.push(row(name, places.map((i) => written(map[i], DIGITS))));
  if (CHANNELS > 1) lines.push(row("", PART_NAMES, true));
  add("mean", MAPS.mean);
  add("std", MAPS.std);
  if (DATA.halfWidthInStd !== null) {
    const bounds = places.map((i) => interval(i));
    const [low, high] = [0, 1].map((end) => bounds.map((bound) => written(bound[end], DIGITS)));
    if (CHANNELS === 1) {
      lines.push(row(LEVEL_NAME, [`${low[0]} to ${high[0]}`]));
    } else {
      lines.push(row(`${LEVEL_NAME} from`, low), row(`${LEVEL_NAME} to`, high));
    }
  }
  add("MAP", MAPS.map);
  add("truth", MAPS.truth);
  if (SAMPLES) lines.push(row("sample", places.map((i) => written(currentSample[i], DIGITS))));
  for (const [key, name] of Object.entries(SHORT)) add(name, MAPS[`diagnostic:${key}`]);
  element("values").replaceChildren(...lines);
}

/** One marginal: what a histogram needs, of a channel, or of magnitude or phase. */
function marginal(channel) {
  const numbers = Array.from({ length: SAMPLES.count }, (_, n) => n);
  if (!COMPLEX) {
    const i = channel * PIXELS + state.pixel;
    const value = (image) => image?.[i];
    return { name: PART_NAMES[channel], values: numbers.map((n) => sampleValue(n, i)), value, band: interval(i) };
  }
  const parts = (n) => [sampleValue(n, state.pixel), sampleValue(n, PIXELS + state.pixel)];
  const angle = scalar(MAPS.mean, state.pixel, "phase");
  // Phases lie within half a turn of the mean's, so that the cut of the circle does not part them.
  const near = (phase) => phase - 2 * Math.PI * Math.round((phase - angle) / (2 * Math.PI));
  const shown = (re, im) => (state.quantity === "phase" ? near(Math.atan2(im, re)) : Math.hypot(re, im));
  const values = numbers.map((n) => shown(...parts(n)));
  const value = (image) => image && shown(image[state.pixel], image[PIXELS + state.pixel]);
  const band = [quantile(values, 0.05), quantile(values, 0.95)];
  return { name: state.quantity === "phase" ? "phase (rad)" : "magnitude", values, value, band };
}

function showMarginals() {
  if (!SAMPLES) return;
  const contents = Array.from({ length: COLOUR ? 3 : 1 }, (_, channel) => {
    const { name, values, value, band } = marginal(channel);
    const marks = [["mean", MAPS.mean], ["map", MAPS.map], ["truth", MAPS.truth], ["sample", currentSample]]
      .map(([kind, image]) => ({ kind, value: value(image) }));
    const figure = document.createElement("div");
    figure.className = "marginal";
    if (name) figure.append(Object.assign(document.createElement("p"), { textContent: name }));
    const label = `Histogram of ${SAMPLES.count} samples at the pixel, mean ${written(value(MAPS.mean))}`;
    const height = COLOUR ? (narrow.matches ? 46 : 74) : 132;
    figure.append(histogram({ values, marks, band, height, label, tone: COLOUR ? PART_NAMES[channel] : "" }));
    if (band && !COMPLEX) figure.append(strip(state.scale, band, "The interval within the scale of the image"));
    return figure;
  });
  element("marginals").replaceChildren(...contents, legend);
}

const legend = document.createElement("p");
legend.className = "legend";
for (const [kind, name] of [
  ["mean", "mean"], MAPS.map && ["map", "MAP"], MAPS.truth && ["truth", "truth"], ["sample", "shown sample"],
  COMPLEX && SAMPLES && ["band", `5 to 95 % of ${SAMPLES.count} samples`],
  !COMPLEX && DATA.halfWidthInStd !== null && ["band", `${LEVEL_NAME} interval`],
  !COMPLEX && DATA.halfWidthInStd !== null && ["part", "the same within the image's scale"],
].filter(Boolean)) {
  const key = document.createElement("i");
  key.className = `key ${kind}`;
  const entry = document.createElement("span");
  entry.append(key, name);
  legend.append(entry);
}

function showPixel() {
  const [line, column] = [Math.floor(state.pixel / WIDTH), state.pixel % WIDTH];
  element("place").textContent = `Row ${line}, column ${column}`;
  element("held").hidden = !state.held;
  views.forEach((view) => view.mark(state));
  showValues();
  showMarginals();
  markDiagnostics();
}
