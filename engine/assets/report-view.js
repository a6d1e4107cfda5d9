// One image on the page: its pixels, its colours, the region that is seen, and what a pointer does to it.

const DRAG = 6; // CSS pixels: less is a click

/** What of the image is seen, in pixels of the image: the same for all views. */
const WHOLE = { x: 0, y: 0, width: WIDTH, height: HEIGHT };

/** The region of this width about a point, inside the image and of its aspect. */
function regionAbout(x, y, width) {
  const narrow = Math.min(WIDTH, Math.max(width, Math.min(WIDTH, 4)));
  const height = narrow * HEIGHT / WIDTH;
  return {
    x: Math.min(WIDTH - narrow, Math.max(0, x - narrow / 2)),
    y: Math.min(HEIGHT - height, Math.max(0, y - height / 2)),
    width: narrow,
    height,
  };
}

/** RGBA bytes of values [H, W] by a table of 256 colours between low and high. */
function coloured(values, table, [low, high], alpha = () => 255) {
  const bytes = new Uint8ClampedArray(4 * PIXELS);
  const scale = 256 / (high - low || 1);
  for (let i = 0; i < PIXELS; i++) {
    if (Number.isNaN(values[i])) continue; // stays transparent
    const index = 3 * Math.min(255, Math.max(0, Math.floor((values[i] - low) * scale)));
    bytes[4 * i] = table[index];
    bytes[4 * i + 1] = table[index + 1];
    bytes[4 * i + 2] = table[index + 2];
    bytes[4 * i + 3] = alpha(i);
  }
  return bytes;
}

/** RGBA bytes of a colour image [3, H, W]; low is black and high is full. */
function rgb(image, [low, high]) {
  const bytes = new Uint8ClampedArray(4 * PIXELS).fill(255);
  for (let i = 0; i < PIXELS; i++) {
    for (let c = 0; c < 3; c++) bytes[4 * i + c] = 255 * (image[c * PIXELS + i] - low) / (high - low || 1);
  }
  return bytes;
}

class View {
  /**
   * paint(state) -> { bytes, table, range, unit }: what is to be seen; table null: colours need no bar.
   * at(pixel, state) -> text: the value at a pixel. meaning: the title in full.
   */
  constructor(parent, { key, title, meaning = title, paint, at }) {
    Object.assign(this, { key, paint, at });
    const copy = document.getElementById("view-template").content.cloneNode(true);
    this.figure = copy.querySelector("figure");
    this.figure.dataset.view = key;
    this.title = copy.querySelector(".title");
    this.value = copy.querySelector(".at");
    this.stage = copy.querySelector(".stage");
    [this.canvas, this.bar] = copy.querySelectorAll("canvas");
    this.marker = copy.querySelector(".marker");
    this.selection = copy.querySelector(".selection");
    this.ends = Object.fromEntries(["low", "unit", "high"].map((end) => [end, copy.querySelector(`.${end}`)]));
    this.stage.style.aspectRatio = `${WIDTH} / ${HEIGHT}`;
    this.buffer = Object.assign(document.createElement("canvas"), { width: WIDTH, height: HEIGHT });
    this.rename(title, meaning);
    parent.append(this.figure);
  }

  rename(title, meaning = title) {
    this.title.textContent = title;
    this.title.title = meaning;
    this.stage.setAttribute("aria-label", `${meaning}, image`);
  }

  /** Colours the image anew. */
  repaint(state) {
    const { bytes, table, range, unit = "" } = this.paint(state);
    this.buffer.getContext("2d").putImageData(new ImageData(bytes, WIDTH, HEIGHT), 0, 0);
    this.bar.hidden = !table;
    if (table) {
      const pixels = new Uint8ClampedArray(1024).fill(255);
      for (let i = 0; i < 256; i++) pixels.set(table.subarray(3 * i, 3 * i + 3), 4 * i);
      this.bar.getContext("2d").putImageData(new ImageData(pixels, 256, 1), 0, 0);
    }
    this.ends.low.textContent = table ? written(range[0], 3) : "";
    this.ends.high.textContent = table ? written(range[1], 3) : "";
    this.ends.unit.textContent = unit;
    this.blit(state);
  }

  /** Shows the region of the painted image. */
  blit({ region }) {
    const width = Math.round(this.stage.clientWidth * devicePixelRatio);
    const height = Math.round(this.stage.clientHeight * devicePixelRatio);
    if (!width || !height) return;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height });
    }
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = width < region.width; // pixels are pixels, unless many share one of the screen
    context.clearRect(0, 0, width, height);
    context.drawImage(this.buffer, region.x, region.y, region.width, region.height, 0, 0, width, height);
  }

  /** Puts the marker on the pixel and writes its value. */
  mark(state) {
    const { region, pixel } = state;
    const left = (pixel % WIDTH - region.x) / region.width;
    const top = (Math.floor(pixel / WIDTH) - region.y) / region.height;
    this.marker.hidden = left < -1e-9 || top < -1e-9 || left >= 1 || top >= 1;
    this.marker.style.left = `${100 * left}%`;
    this.marker.style.top = `${100 * top}%`;
    this.marker.style.width = `${100 / region.width}%`;
    this.marker.style.height = `${100 / region.height}%`;
    this.value.textContent = this.at(pixel, state);
  }

  /** The point of the image, in pixels, under a pointer. */
  point(event, region) {
    const box = this.stage.getBoundingClientRect();
    const share = (value, size) => Math.min(1 - 1e-9, Math.max(0, value / size));
    return {
      x: region.x + share(event.clientX - box.left, box.width) * region.width,
      y: region.y + share(event.clientY - box.top, box.height) * region.height,
    };
  }

  /** Reports reading(pixel), hold() and zoom(region) from pointers; state() gives the region that is seen. */
  listen({ state, reading, hold, zoom }) {
    const place = ({ x, y }) => Math.floor(y) * WIDTH + Math.floor(x);
    let from = null;
    const dragged = (event) => Math.hypot(event.clientX - from.clientX, event.clientY - from.clientY) >= DRAG;
    this.stage.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch") return reading(place(this.point(event, state().region)), true);
      if (event.button !== 0) return;
      from = event;
      this.stage.setPointerCapture(event.pointerId);
    });
    this.stage.addEventListener("pointermove", (event) => {
      if (from && dragged(event)) return this.select(from, event);
      if (!from) reading(place(this.point(event, state().region)), event.pointerType === "touch");
    });
    this.stage.addEventListener("pointerup", (event) => {
      if (!from) return;
      const start = this.point(from, state().region), end = this.point(event, state().region);
      if (dragged(event)) {
        const width = Math.max(Math.abs(end.x - start.x), Math.abs(end.y - start.y) * WIDTH / HEIGHT);
        zoom(regionAbout((start.x + end.x) / 2, (start.y + end.y) / 2, width));
      } else {
        hold(place(end));
      }
      from = this.deselect();
    });
    this.stage.addEventListener("pointercancel", () => { from = this.deselect(); });
  }

  select(from, to) {
    const box = this.stage.getBoundingClientRect();
    const inside = (value, low, size) => Math.min(size, Math.max(0, value - low));
    const x = [from, to].map((event) => inside(event.clientX, box.left, box.width)).sort((a, b) => a - b);
    const y = [from, to].map((event) => inside(event.clientY, box.top, box.height)).sort((a, b) => a - b);
    this.selection.hidden = false;
    Object.assign(this.selection.style, {
      left: `${x[0]}px`, top: `${y[0]}px`, width: `${x[1] - x[0]}px`, height: `${y[1] - y[0]}px`,
    });
  }

  deselect() {
    this.selection.hidden = true;
    return null;
  }
}
