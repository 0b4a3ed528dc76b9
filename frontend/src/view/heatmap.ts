/** The heatmap: a grid of ratios to the fair share on a canvas, through a lookup table and one `putImageData`. */
import { DEAD, cssColour, currentTheme, indexOf, lut } from "./colour";

/** What to draw. Cells are [row, column], row-major; NaN means no data. */
export interface Picture {
  rows: number;
  columns: number;
  ratios: Float32Array;
  rowLabel: (row: number) => string;
  columnLabel: (column: number) => string;
  rowTitle: string;
  columnTitle: string;
  /** Columns or rows before which a device border lies. */
  columnBorders: number[];
  rowBorders: number[];
  /** The row that the rest of the page shows, and the column (of the cursor's step, or of the chosen expert). */
  markedRow: number | null;
  markedColumn: number | null;
  /** The mark is one cell, not a row and a column. */
  markedCell: boolean;
}

export interface Box {
  left: number;
  top: number;
  width: number;
  height: number;
}

export interface Cell {
  row: number;
  column: number;
}

const MARGIN = { left: 46, top: 6, right: 2, bottom: 34 };
const MIN_GAP_PX = 9;
const MIN_MARK_PX = 9;
const DEAD_MARK = "#ff8a8a";

const clamp = (value: number, low: number, high: number): number => Math.min(Math.max(value, low), high);

/** Height in CSS pixels that suits `rows` rows. */
export const heightFor = (rows: number): number => MARGIN.top + MARGIN.bottom + Math.round(rows * clamp(336 / Math.max(rows, 1), 1.5, 44));

export class Heatmap {
  box: Box = { left: 0, top: 0, width: 0, height: 0 };
  picture: Picture | null = null;
  focus: Cell | null = null;
  private readonly cells = document.createElement("canvas");
  private readonly context: CanvasRenderingContext2D;
  private image: ImageData | null = null;
  private pixels = new Uint32Array(0);

  constructor(readonly canvas: HTMLCanvasElement) {
    this.context = canvas.getContext("2d")!;
  }

  draw(picture: Picture): void {
    this.picture = picture;
    const { canvas, context } = this;
    const scale = devicePixelRatio || 1;
    const width = canvas.parentElement!.clientWidth;
    const height = heightFor(picture.rows);
    this.fit(width, height, scale);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    this.box = { left: MARGIN.left, top: MARGIN.top, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    if (!picture.rows || !picture.columns || this.box.width <= 0) return;
    this.paint(picture);
    this.overlay(picture);
    this.axes(picture);
  }

  /** The cell under a point of the canvas, in CSS pixels. */
  cellAt(x: number, y: number): Cell | null {
    const { box, picture } = this;
    if (!picture || !picture.columns) return null;
    const column = Math.floor(((x - box.left) / box.width) * picture.columns);
    const row = Math.floor(((y - box.top) / box.height) * picture.rows);
    return column < 0 || row < 0 || column >= picture.columns || row >= picture.rows ? null : { row, column };
  }

  private fit(width: number, height: number, scale: number): void {
    const { canvas } = this;
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width === w && canvas.height === h) return;
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }

  private paint({ rows, columns, ratios }: Picture): void {
    if (!this.image || this.image.width !== columns || this.image.height !== rows) {
      this.cells.width = columns;
      this.cells.height = rows;
      this.image = new ImageData(columns, rows);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const table = lut(currentTheme());
    for (let i = 0; i < ratios.length; i++) this.pixels[i] = table[indexOf(ratios[i])];
    this.cells.getContext("2d")!.putImageData(this.image, 0, 0);
    this.context.imageSmoothingEnabled = false;
    const { left, top, width, height } = this.box;
    this.context.drawImage(this.cells, left, top, width, height);
  }

  private overlay(picture: Picture): void {
    const { context, box } = this;
    const style = getComputedStyle(this.canvas);
    const [cw, ch] = [box.width / picture.columns, box.height / picture.rows];
    if (cw >= MIN_GAP_PX && ch >= MIN_GAP_PX) this.gaps(picture, cw, ch, style.getPropertyValue("--surface"));
    if (cw >= MIN_MARK_PX && ch >= MIN_MARK_PX) this.deadMarks(picture, cw, ch, DEAD_MARK);
    context.fillStyle = style.getPropertyValue("--ink");
    for (const column of picture.columnBorders) context.fillRect(box.left + column * cw - 1, box.top - 4, 2, box.height + 8);
    for (const row of picture.rowBorders) context.fillRect(box.left - 4, box.top + row * ch - 1, box.width + 4, 2);
    this.marks(picture, cw, ch, style.getPropertyValue("--ink"));
    if (this.focus) this.outline(this.focus.column, this.focus.row, 1, 1, cw, ch, style.getPropertyValue("--accent"), 2);
  }

  private gaps(picture: Picture, cw: number, ch: number, colour: string): void {
    this.context.fillStyle = colour;
    for (let column = 1; column < picture.columns; column++) this.context.fillRect(this.box.left + column * cw - 0.5, this.box.top, 1, this.box.height);
    for (let row = 1; row < picture.rows; row++) this.context.fillRect(this.box.left, this.box.top + row * ch - 0.5, this.box.width, 1);
  }

  private deadMarks(picture: Picture, cw: number, ch: number, colour: string): void {
    const { context, box } = this;
    const arm = Math.min(cw, ch, 16) / 4;
    context.strokeStyle = colour;
    context.lineWidth = 1.5;
    context.beginPath();
    for (let i = 0; i < picture.ratios.length; i++) {
      if (picture.ratios[i] !== 0) continue;
      const x = box.left + ((i % picture.columns) + 0.5) * cw;
      const y = box.top + (Math.floor(i / picture.columns) + 0.5) * ch;
      context.moveTo(x - arm, y - arm);
      context.lineTo(x + arm, y + arm);
      context.moveTo(x + arm, y - arm);
      context.lineTo(x - arm, y + arm);
    }
    context.stroke();
  }

  private marks(picture: Picture, cw: number, ch: number, colour: string): void {
    const { markedRow, markedColumn } = picture;
    if (markedRow !== null) this.outline(0, markedRow, picture.columns, 1, cw, ch, colour, 1);
    if (markedColumn === null) return;
    if (picture.markedCell) this.outline(markedColumn, markedRow ?? 0, 1, 1, cw, ch, colour, 2.5);
    else this.outline(markedColumn, 0, 1, picture.rows, cw, ch, colour, 1);
  }

  private outline(column: number, row: number, columns: number, rows: number, cw: number, ch: number, colour: string, width: number): void {
    const { context, box } = this;
    context.strokeStyle = colour;
    context.lineWidth = width;
    const [w, h] = [Math.max(columns * cw, 3), Math.max(rows * ch, 3)];
    context.strokeRect(box.left + column * cw, box.top + row * ch, w, h);
  }

  private axes(picture: Picture): void {
    const { context, box } = this;
    const style = getComputedStyle(this.canvas);
    context.fillStyle = style.getPropertyValue("--ink-soft");
    context.font = `11px ${style.fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const ch = box.height / picture.rows;
    const rowStride = Math.max(1, Math.ceil(13 / ch));
    for (let row = 0; row < picture.rows; row += rowStride) context.fillText(picture.rowLabel(row), box.left - 7, box.top + (row + 0.5) * ch);
    context.textAlign = "center";
    const cw = box.width / picture.columns;
    const widest = context.measureText(picture.columnLabel(picture.columns - 1)).width + 14;
    const columnStride = Math.max(1, Math.ceil(widest / cw));
    for (let column = 0; column < picture.columns; column += columnStride) {
      const x = clamp(box.left + (column + 0.5) * cw, box.left + 4, box.left + box.width - widest / 2 + 6);
      context.fillText(picture.columnLabel(column), x, box.top + box.height + 12);
    }
    context.fillText(picture.columnTitle, box.left + box.width / 2, box.top + box.height + 27);
    context.save();
    context.translate(9, box.top + box.height / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(picture.rowTitle, 0, 0);
    context.restore();
  }
}

/** Paints the legend of the scale into `canvas`: the colours from ×1/4 to ×4, with a box for the dead. */
export function drawLegend(canvas: HTMLCanvasElement): void {
  const context = canvas.getContext("2d")!;
  const image = new ImageData(256, 1);
  new Uint32Array(image.data.buffer).set(lut(currentTheme()).subarray(0, 256));
  canvas.width = 256;
  canvas.height = 1;
  context.putImageData(image, 0, 0);
  canvas.parentElement?.style.setProperty("--dead", cssColour(currentTheme(), DEAD));
}
