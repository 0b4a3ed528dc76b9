/** A picture for others to see: a canvas of the page on the theme's background, with title, axes' names, key, and what run and steps it is of. */

export interface Key {
  label: string;
  /** A custom property of the style sheet. */
  colour: string;
  shape: "line" | "dot" | "triangle" | "cross" | "scale";
}

export interface Shown {
  canvas: HTMLCanvasElement;
  title: string;
  about: string;
  /** What the axes are, where the canvas does not say so itself. */
  xTitle?: string;
  yTitle?: string;
  keys: Key[];
}

const PAD = 16;
const HEAD = 46;
const LINE = 20;
/** Between a key's mark and its label, and between keys. */
const GAP = 6;
const BETWEEN = 18;
const SCALE = { width: 140, height: 9 };

/** `scale` is the canvas of the colour scale. Sizes are in CSS pixels, drawn as finely as the page's canvas is. */
export function compose(shown: Shown, style: CSSStyleDeclaration, scale: HTMLCanvasElement | null): HTMLCanvasElement {
  const { canvas, xTitle, yTitle, keys } = shown;
  const [inner, tall] = [canvas.clientWidth, canvas.clientHeight];
  const left = PAD + (yTitle ? LINE : 0);
  const foot = PAD + HEAD + tall + (xTitle ? LINE : 0);
  const page = document.createElement("canvas");
  const fine = canvas.width / inner;
  const context = page.getContext("2d")!;
  const font = (context.font = `11px ${style.fontFamily}`);
  const named = keys.map((key) => ({ ...key, label: cut(context, key.label, inner - markWidth(key) - GAP) }));
  const places = flow(named.map((key) => markWidth(key) + GAP + context.measureText(key.label).width), inner);
  page.width = Math.round((left + inner + PAD) * fine);
  page.height = Math.round((foot + (keys.length ? (places.at(-1)!.row + 1) * LINE + 4 : 0) + PAD) * fine);
  context.scale(fine, fine);
  context.fillStyle = style.getPropertyValue("--surface");
  context.fillRect(0, 0, page.width, page.height);
  head(context, shown, style, left + inner - PAD);
  context.drawImage(canvas, left, PAD + HEAD, inner, tall);
  context.fillStyle = style.getPropertyValue("--ink-soft");
  context.font = font;
  context.textAlign = "center";
  if (xTitle) context.fillText(xTitle, left + inner / 2, PAD + HEAD + tall + 12);
  if (yTitle) upwards(context, yTitle, PAD + 6, PAD + HEAD + tall / 2);
  context.textAlign = "left";
  named.forEach((key, i) => drawKey(context, key, style, scale, left + places[i].x, foot + 12 + places[i].row * LINE));
  return page;
}

/** Where things of these widths stand one after another, in rows no wider than `width`. */
export function flow(widths: number[], width: number): { x: number; row: number }[] {
  let [x, row] = [0, 0];
  return widths.map((own) => {
    if (x && x + own > width) [x, row] = [0, row + 1];
    const place = { x, row };
    x += own + BETWEEN;
    return place;
  });
}

const markWidth = ({ shape }: Key): number => (shape === "scale" ? SCALE.width : 12);

function head(context: CanvasRenderingContext2D, { title, about }: Shown, style: CSSStyleDeclaration, width: number): void {
  context.textBaseline = "middle";
  context.fillStyle = style.getPropertyValue("--ink");
  context.font = `600 15px ${style.fontFamily}`;
  context.fillText(cut(context, title, width), PAD, PAD + 9);
  context.fillStyle = style.getPropertyValue("--ink-soft");
  context.font = `12px ${style.fontFamily}`;
  context.fillText(cut(context, about, width), PAD, PAD + 29);
}

function upwards(context: CanvasRenderingContext2D, text: string, x: number, y: number): void {
  context.save();
  context.translate(x, y);
  context.rotate(-Math.PI / 2);
  context.fillText(text, 0, 0);
  context.restore();
}

/** Draws the key at (x, y), the middle of its left edge. */
function drawKey(context: CanvasRenderingContext2D, key: Key, style: CSSStyleDeclaration, scale: HTMLCanvasElement | null, x: number, y: number): void {
  const { label, colour, shape } = key;
  const wide = markWidth(key);
  context.fillStyle = context.strokeStyle = style.getPropertyValue(colour);
  context.beginPath();
  if (shape === "scale" && scale) context.drawImage(scale, x, y - SCALE.height / 2, SCALE.width, SCALE.height);
  else if (shape === "line") context.rect(x, y - 1.5, wide, 3);
  else if (shape === "dot") context.arc(x + 6, y, 4, 0, 2 * Math.PI);
  else if (shape === "triangle") for (const [dx, dy] of [[1, -4], [11, -4], [6, 4]]) context.lineTo(x + dx, y + dy);
  else if (shape === "cross") context.fillText("×", x + 3, y);
  context.fill();
  context.fillStyle = style.getPropertyValue("--ink-soft");
  context.fillText(label, x + wide + GAP, y);
}

/** As much of `text` as fits. */
function cut(context: CanvasRenderingContext2D, text: string, width: number): string {
  if (context.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 0 && context.measureText(`${text.slice(0, end)}…`).width > width) end--;
  return `${text.slice(0, end)}…`;
}
