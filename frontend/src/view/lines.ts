/** A line chart of the run page: uPlot with the page's colours, its shared step cursor, zoom by dragging, and a table behind. */
import uPlot from "uplot";
import { metric, whole } from "../data/format";
import type { RunStore } from "../data/store";
import { onThemeChange } from "./colour";
import { setText } from "./dom";
import { perFrame, watchSize } from "./frame";
import { rowAt } from "../data/series";
import { rowsIn, sparse } from "../data/told";
import { initBehind } from "./behind";
import type { Key } from "./compose";
import { initSave, type Savable } from "./save";

export interface Line {
  label: string;
  /** A custom property of the style sheet, such as --line-1. */
  colour: string;
  width?: number;
  faint?: boolean;
}

/** Columns to draw: x, then for each line its values, then for a line with a band its least and greatest. */
export interface Drawing {
  x: Float64Array;
  /** The first step that each row stands for, `x` being the last; null where each stands for one. */
  first: Float64Array | null;
  lines: Line[];
  values: Float64Array[];
  band: { min: Float64Array; max: Float64Array } | null;
}

export interface LineOptions {
  title: string;
  /** In CSS pixels; as high as its box where it is left out. */
  height?: number;
  /** What to draw now; null while there is nothing. */
  drawing: () => Drawing | null;
  /** Why there is nothing, where that is known better than at first. */
  empty?: () => string | undefined;
  log?: () => boolean;
  /** What the y axis is, on a saved picture; the title where it is left out. */
  yTitle?: string;
  /** The marks that `over` draws, for a saved picture. */
  marks?: Key[];
  /** Draws on top, in canvas pixels. */
  over?: (plot: uPlot) => void;
  format?: (value: number) => string;
  /** Ticks of the y axis, where they read otherwise than the values. */
  tick?: (value: number) => string;
  /** The least span of the y axis to show, so that noise on a constant does not fill the picture. */
  zeroBased?: boolean;
}

const SYNC = "run";

export class LineChart {
  private plot: uPlot | null = null;
  private shape = "";
  private drawing: Drawing | null = null;
  private readonly box: HTMLElement;
  /** What stands in the chart's place until there is one. */
  private readonly hint: string;
  private readonly readout: HTMLElement | null;
  private readonly size: { visible: () => boolean };
  readonly redraw: () => void;

  constructor(
    private readonly figure: HTMLElement,
    private readonly store: RunStore,
    private readonly options: LineOptions,
  ) {
    this.box = figure.querySelector<HTMLElement>(".plot")!;
    this.hint = this.box.dataset.empty ?? "";
    this.readout = figure.querySelector<HTMLElement>(".readout");
    this.redraw = perFrame(() => this.draw());
    this.size = watchSize(this.box, this.redraw);
    store.on(["steps", "range", "cursor", "failure"], this.redraw);
    onThemeChange(this.redraw);
    initBehind(figure, () => this.table());
    initSave(figure, store, () => this.savable());
  }

  private draw(): void {
    if (!this.size.visible() || !this.box.clientWidth) return;
    const drawing = (this.drawing = this.options.drawing());
    this.figure.classList.toggle("is-empty", !drawing);
    this.box.dataset.empty = this.options.empty?.() ?? this.hint;
    if (!drawing) return;
    const log = this.options.log?.() ?? false;
    const shape = `${drawing.lines.map((line) => line.label + line.colour).join()}/${Boolean(drawing.band)}/${log}`;
    if (shape !== this.shape) this.build(drawing, log, shape);
    const plot = this.plot!;
    if (plot.width !== this.box.clientWidth || plot.height !== this.height) plot.setSize({ width: this.box.clientWidth, height: this.height });
    plot.setData(this.columns(drawing) as unknown as uPlot.AlignedData);
    this.describe(drawing);
    this.read(plot.cursor.idx ?? null);
  }

  private get height(): number {
    return this.options.height ?? this.box.clientHeight;
  }

  private columns(drawing: Drawing): Float64Array[] {
    const band = drawing.band ? [drawing.band.min, drawing.band.max] : [];
    return [drawing.x, ...band, ...drawing.values];
  }

  private build(drawing: Drawing, log: boolean, shape: string): void {
    this.plot?.destroy();
    this.shape = shape;
    this.plot = new uPlot(this.plotOptions(drawing, log), undefined, this.box);
    this.listen(this.plot);
  }

  private plotOptions(drawing: Drawing, log: boolean): uPlot.Options {
    const css = (name: string) => () => getComputedStyle(this.figure).getPropertyValue(name);
    const font = `11px ${getComputedStyle(this.figure).fontFamily}`;
    const axis = { stroke: css("--ink-soft"), font, grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false } };
    const first = drawing.band ? 3 : 1;
    const lines: uPlot.Series[] = drawing.lines.map((line) => ({
      label: line.label,
      stroke: css(line.colour),
      width: line.width ?? 1.5,
      alpha: line.faint ? 0.35 : 1,
      points: { show: () => !line.faint && this.drawing !== null && sparse(this.drawing.x, this.store.shown) },
      spanGaps: false,
    }));
    const hidden: uPlot.Series = { stroke: "transparent", width: 0, points: { show: false } };
    return {
      width: this.box.clientWidth,
      height: this.height,
      legend: { show: false },
      padding: [8, 14, 0, 0],
      scales: { x: { time: false, range: () => this.xRange() }, y: { distr: log ? 3 : 1, range: log ? undefined : (_, min, max) => this.yRange(min, max) } },
      axes: [
        { ...axis, size: 26, gap: 4, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? whole(tick) : "")) },
        { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : (this.options.tick ?? this.options.format ?? metric)(tick))) },
      ],
      series: [{}, ...(drawing.band ? [hidden, hidden] : []), ...lines],
      bands: drawing.band ? [{ series: [2, 1], fill: css("--band") }] : [],
      cursor: { sync: { key: SYNC }, y: false, drag: { x: true, y: false, setScale: false }, points: { show: (_, i) => i >= first && document.createElement("div") } as uPlot.Cursor.Points },
      hooks: { draw: [(plot) => this.overlay(plot)], setCursor: [(plot) => this.read(plot.cursor.idx ?? null)], setSelect: [(plot) => this.select(plot)] },
    } as uPlot.Options;
  }

  private xRange(): uPlot.Range.MinMax {
    const { from, to } = this.store.shown;
    return [from, Math.max(to, from + 1)];
  }

  private yRange(min: number | null, max: number | null): uPlot.Range.MinMax {
    let [low, high] = this.drawing && sparse(this.drawing.x, this.store.shown) ? this.reach(this.drawing) : [min ?? 0, max ?? 1];
    if (this.options.zeroBased && low >= 0) low = 0;
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [this.options.zeroBased && low === 0 ? 0 : low - pad, high + pad];
  }

  /** The least and greatest value of the rows that are shown and of those beside them, which lines lead to. */
  private reach({ x, values }: Drawing): [number, number] {
    const [first, last] = rowsIn(x, this.store.shown);
    const near = values.flatMap((column) => [...column.subarray(Math.max(first - 1, 0), last + 2)]).filter(Number.isFinite);
    return near.length ? [Math.min(...near), Math.max(...near)] : [0, 1];
  }

  /** A click chooses the step; dragging chooses the range (`select`); a double click shows everything. */
  private listen(plot: uPlot): void {
    let downAt = 0;
    plot.over.addEventListener("pointerdown", (event) => (downAt = event.clientX));
    plot.over.addEventListener("click", (event) => {
      if (Math.abs(event.clientX - downAt) < 4) this.store.setStep(plot.posToVal(plot.cursor.left ?? 0, "x"));
    });
    plot.over.addEventListener("dblclick", () => this.store.setRange(null));
  }

  private select(plot: uPlot): void {
    const { left, width } = plot.select;
    if (width < 4) return;
    const [from, to] = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")].map(Math.round);
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (to > from) this.store.setRange({ from: Math.max(from, 1), to: Math.min(to, this.store.lastStep) });
  }

  private overlay(plot: uPlot): void {
    const { from, to } = this.store.shown;
    if (!this.store.follow && this.store.step >= from && this.store.step <= to) {
      const x = Math.round(plot.valToPos(this.store.step, "x", true));
      plot.ctx.fillStyle = getComputedStyle(this.figure).getPropertyValue("--accent");
      plot.ctx.fillRect(x - devicePixelRatio / 2, plot.bbox.top, devicePixelRatio, plot.bbox.height);
    }
    this.options.over?.(plot);
  }

  /** Writes the values at the pointer, or else at the page's step, into the caption. */
  private read(index: number | null): void {
    const { drawing } = this;
    if (!drawing || !this.readout || !drawing.x.length) return;
    const at = Math.min(index ?? rowAt(drawing.x, this.store.step), drawing.x.length - 1);
    const format = this.options.format ?? metric;
    const one = drawing.lines.filter((line) => !line.faint).length === 1;
    const parts = drawing.lines.flatMap((line, i) => (line.faint ? [] : [`${one ? "" : `${line.label} `}${format(drawing.values[i][at])}`]));
    setText(this.readout, `${parts.join(" · ")}${index === null && drawing.x[at] === this.store.step ? "" : ` @ ${whole(drawing.x[at])}`}`);
  }

  private describe({ x, lines, values }: Drawing): void {
    const [first, last] = rowsIn(x, this.store.shown);
    const text = lines.map((line, i) => `${line.label} from ${metric(values[i][first])} to ${metric(values[i][last])}`).join("; ");
    this.box.setAttribute("aria-label", `${this.options.title}, steps ${whole(x[first] ?? 0)} to ${whole(x[last] ?? 0)}: ${text}`);
  }

  /** Every row of the shown steps; where a row stands for several, with its first and last step, the least and the greatest. */
  private savable(): Savable | null {
    const { drawing, plot, options } = this;
    if (!drawing || !plot || this.figure.classList.contains("is-empty")) return null;
    const { x, first: firsts, lines, values, band } = drawing;
    const { from, to } = this.store.shown;
    const [first, last] = rowsIn(x, { from, to });
    const columns = [...(firsts ? [firsts, x] : [x]), ...values, ...(band ? [band.min, band.max] : [])];
    const head = [...(firsts ? ["first_step", "last_step"] : ["step"]), ...lines.map(({ label, faint, width }) => (width === 2 && !faint ? `${label}, smoothed` : label)), ...(band ? ["least", "greatest"] : [])];
    const rows = Array.from({ length: last - first + 1 }, (_, i) => columns.map((column) => column[first + i]));
    // A line that stands faintly behind its smoothed self needs no name of its own.
    const named = lines.filter(({ label, faint }) => !faint || lines.every((other) => other.faint || other.label !== label));
    const keys = [...(named.length > 1 ? named.map(({ label, colour }): Key => ({ label, colour, shape: "line" })) : []), ...(options.marks ?? [])];
    return { steps: [from, to], picture: { canvas: plot.ctx.canvas, xTitle: "step", yTitle: options.yTitle ?? options.title, keys }, table: { head, rows } };
  }

  private table(): { head: string[]; rows: string[][] } {
    const drawing = this.drawing ?? this.options.drawing();
    if (!drawing) return { head: ["step"], rows: [] };
    const { x, first: firsts } = drawing;
    const [first, last] = rowsIn(x, this.store.shown);
    const rows = Array.from({ length: last - first + 1 }, (_, i) => first + i);
    const shown = rows.filter((_, i) => i % Math.ceil(rows.length / 100) === 0 || i === rows.length - 1);
    return {
      head: ["step", ...drawing.lines.map((line) => line.label)],
      rows: shown.map((i) => [firsts && firsts[i] < x[i] ? `${whole(firsts[i])}–${whole(x[i])}` : whole(x[i]), ...drawing.values.map((column) => metric(column[i]))]),
    };
  }
}
