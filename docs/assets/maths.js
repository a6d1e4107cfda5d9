// Sets what pymdownx.arithmatex has marked; KaTeX is in assets/katex, so that the site needs no network.
document.querySelectorAll(".arithmatex").forEach((element) => {
  const source = element.textContent.slice(2, -2); // between \( and \), or \[ and \]
  katex.render(source, element, { displayMode: element.tagName === "DIV", throwOnError: false });
});
