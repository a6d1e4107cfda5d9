// What can be done on the page: pointers, keys, zoom, scales, and the samples one after the other.

let waiting = false;
function markSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; showPixel(); });
}

function read(pixel, touch = false) {
  if (state.held && !touch) return;
  state.held = false;
  state.pixel = pixel;
  markSoon();
}

function hold(pixel) {
  state.held = !(state.held && state.pixel === pixel);
  state.pixel = pixel;
  markSoon();
}

function zoom(region) {
  state.region = region;
  views.forEach((view) => view.blit(state));
  element("zoom-out").disabled = element("zoom-reset").disabled = region.width >= WIDTH;
  markSoon();
}

function zoomBy(factor) {
  const x = state.pixel % WIDTH + 0.5, y = Math.floor(state.pixel / WIDTH) + 0.5;
  zoom(regionAbout(x, y, state.region.width / factor));
}

function move(right, down) {
  const column = Math.min(WIDTH - 1, Math.max(0, state.pixel % WIDTH + right));
  const line = Math.min(HEIGHT - 1, Math.max(0, Math.floor(state.pixel / WIDTH) + down));
  state.pixel = line * WIDTH + column;
  const { region } = state;
  const seen = column >= region.x && column + 1 <= region.x + region.width && line >= region.y &&
    line + 1 <= region.y + region.height;
  if (!seen) zoom(regionAbout(column + 0.5, line + 0.5, region.width));
  showPixel();
  const said = (map) => PART_NAMES.map((_, c) => written(map[c * PIXELS + state.pixel], 3)).join(", ");
  const spread = MAPS.std ? `; standard deviation ${said(MAPS.std)}` : "";
  element("spoken").textContent = `Row ${line}, column ${column}: mean ${said(MAPS.mean)}${spread}`;
}

const KEYS = {
  ArrowLeft: () => move(-1, 0),
  ArrowRight: () => move(1, 0),
  ArrowUp: () => move(0, -1),
  ArrowDown: () => move(0, 1),
  Enter: () => hold(state.pixel),
  Escape: () => { state.held = false; markSoon(); },
  "+": () => zoomBy(2),
  "=": () => zoomBy(2),
  "-": () => zoomBy(0.5),
  0: () => zoom(WHOLE),
};

for (const view of views) {
  view.listen({ state: () => state, reading: read, hold, zoom });
  view.stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
}
element("zoom-in").addEventListener("click", () => zoomBy(2));
element("zoom-out").addEventListener("click", () => zoomBy(0.5));
element("zoom-reset").addEventListener("click", () => zoom(WHOLE));

function repaintAll() {
  views.forEach((view) => view.repaint(state));
  markSoon();
}

function writeScale() {
  for (const name of ["low", "high", "spread"]) {
    element(`scale-${name}`).value = Number(state.scale[name].toPrecision(4));
  }
}

for (const name of ["low", "high", "spread"]) {
  element(`scale-${name}`).addEventListener("change", (event) => {
    const wanted = { ...state.scale, [name]: event.target.valueAsNumber };
    if (wanted.low < wanted.high && wanted.spread > 0) { // false for what is no number
      state.scale = wanted;
      repaintAll();
    }
    writeScale();
  });
}
element("scale-reset").addEventListener("click", () => {
  state.scale = { ...SCALE };
  writeScale();
  repaintAll();
});

element("quantity").hidden = !COMPLEX;
for (const choice of document.getElementsByName("quantity")) {
  choice.addEventListener("change", () => {
    state.quantity = choice.value;
    repaintAll();
  });
}

function playSamples() {
  const view = views.find(({ key }) => key === "sample");
  view.figure.append(element("sample-template").content.cloneNode(true));
  const slider = element("slider"), play = element("play");
  slider.max = SAMPLES.count - 1;
  const show = (n) => {
    state.sample = (n + SAMPLES.count) % SAMPLES.count;
    currentSample = sampleImage(state.sample);
    const number = SAMPLES.places ? SAMPLES.places[state.sample] : state.sample;
    const total = SAMPLES.places ? DATA.numSamples : SAMPLES.count;
    const name = `Sample ${number + 1} of ${total}`;
    view.rename(`Sample ${number + 1}/${total}`, name);
    slider.value = state.sample;
    slider.setAttribute("aria-valuetext", name);
    view.repaint(state);
    markSoon();
  };
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.setAttribute("aria-pressed", "false");
    play.textContent = "Play";
  };
  const byHand = (n) => { stop(); show(n); };
  slider.addEventListener("input", () => byHand(slider.valueAsNumber));
  element("previous").addEventListener("click", () => byHand(state.sample - 1));
  element("next").addEventListener("click", () => byHand(state.sample + 1));
  play.addEventListener("click", () => {
    if (timer) return stop();
    timer = setInterval(() => show(state.sample + 1), 250);
    play.setAttribute("aria-pressed", "true");
    play.textContent = "Stop";
  });
  show(0);
}

writeScale();
repaintAll();
zoom(WHOLE);
if (SAMPLES) playSamples();
showPixel();
new ResizeObserver(() => {
  views.forEach((view) => view.blit(state));
  markSoon();
}).observe(document.body);
