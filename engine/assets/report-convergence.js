// The convergence maps and plots: what the diagnostics hold of every pixel, and the energies.

const DIAGNOSTICS = {
  r_hat: { title: "R-hat", better: "low" },
  mcse: { title: "Monte Carlo error", better: "low" },
  ess: { title: "Effective samples", better: "high" },
};

function diagnosticView(key, title, map) {
  const range = [quantile(map, 0), quantile(map, 1)];
  const paint = () => ({ bytes: coloured(map, COLOURS.spread, range), table: COLOURS.spread, range });
  return { key, title, paint, at: (pixel) => written(map[pixel]) };
}

/** A map with its histogram; where it is the same at every pixel, a sentence. */
function showDiagnostic(key) {
  const { title, better } = DIAGNOSTICS[key] ?? { title: key, better: "low" };
  const map = worst(MAPS[`diagnostic:${key}`], better);
  if (map.every((value) => Object.is(value, map[0]))) {
    const sentence = { textContent: `${title}: ${written(map[0])} at every pixel` };
    element("constant").append(Object.assign(document.createElement("li"), sentence));
    return [];
  }
  const view = new View(element("convergence"), diagnosticView(key, title, map));
  const marks = [{ kind: "mean", value: NaN }]; // moves to the value at the marked pixel
  const plot = histogram({ values: map, marks, label: `${title} over the pixels`, height: 100 });
  view.figure.append(plot);
  return [{ view, plot, map }];
}

function energyFigure() {
  const marks = SAMPLES?.places ? [{ kind: "sample", value: NaN }] : [];
  const plot = histogram({ values: ENERGY, marks, label: `Energies of ${ENERGY.length} samples` });
  const figure = document.createElement("figure");
  figure.append(Object.assign(document.createElement("figcaption"), { textContent: "Energy of the samples" }), plot);
  element("convergence").append(figure);
  return plot;
}

const known = [...Object.keys(DIAGNOSTICS), ...Object.keys(MAPS).map((name) => name.split("diagnostic:")[1])];
const diagnostics = [...new Set(known)].filter((key) => key && MAPS[`diagnostic:${key}`]).flatMap(showDiagnostic);
views.push(...diagnostics.map(({ view }) => view));
const energyPlot = energyFigure();

function markDiagnostics() {
  for (const { plot, map } of diagnostics) plot.mark("mean", map[state.pixel]);
  if (SAMPLES?.places) energyPlot.mark("sample", ENERGY[SAMPLES.places[state.sample]]);
}
