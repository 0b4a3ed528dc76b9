/** Curves of several runs in one chart, each with its own steps. */
import uPlot from "uplot";
import { metric as format, whole } from "../data/format";
import type { Series } from "../data/series";
import { initBehind, type Rows } from "./behind";
import { onThemeChange } from "./colour";
import { setText } from "./dom";
import { perFrame, watchSize } from "./frame";

export interface Curve {
  label: string;
  colour: string;
  series: Series;
  hidden: boolean;
}

export interface OverlayState {
  metric: string;
  log: boolean;
  curves: Curve[];
}

const HEIGHT = 400;
const MAX_TABLE_ROWS = 100;

export class Overlay {
  private plot: uPlot | null = null;
  private readonly box: HTMLElement;
  readonly redraw: () => void;

  constructor(
    private readonly figure: HTMLElement,
    private readonly state: () => OverlayState,
  ) {
    this.box = figure.querySelector<HTMLElement>(".plot")!;
    this.redraw = perFrame(() => this.draw());
    watchSize(this.box, this.redraw);
    onThemeChange(this.redraw);
    initBehind(figure, () => this.rows());
  }

  private draw(): void {
    const { metric, curves, log } = this.state();
    setText(this.figure.querySelector("h2"), metric);
    this.plot?.destroy();
    const css = (name: string) => () => getComputedStyle(this.figure).getPropertyValue(name);
    const axis = { stroke: css("--ink-soft"), font: `11px ${getComputedStyle(this.figure).fontFamily}`, grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false } };
    this.plot = new uPlot(
      {
        width: this.box.clientWidth,
        height: HEIGHT,
        legend: { show: false },
        scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
        axes: [
          { ...axis, size: 26, gap: 4, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? whole(tick) : "")) },
          { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick))) },
        ],
        series: [{}, ...curves.map((curve) => ({ label: curve.label, stroke: css(curve.colour), width: 1.5, show: !curve.hidden, spanGaps: true, points: { show: false } }))],
        cursor: { y: false, drag: { x: true, y: false } },
        hooks: { setCursor: [(plot) => this.read(plot, curves)] },
      } as uPlot.Options,
      this.data(metric, curves),
      this.box,
    );
    this.box.setAttribute("aria-label", `${metric} of ${curves.map((curve) => curve.label).join(", ")}`);
  }

  private data(metric: string, curves: Curve[]): uPlot.AlignedData {
    const tables = curves.map(({ series }) => {
      const values = series.view(metric)?.mean;
      return [series.step.subarray(0, series.length), values ?? new Float64Array(series.length).fill(NaN)] as unknown as uPlot.AlignedData;
    });
    return uPlot.join(tables);
  }

  private read(plot: uPlot, curves: Curve[]): void {
    const at = plot.cursor.idx;
    if (at === null || at === undefined) return setText(this.figure.querySelector(".readout"), "");
    const step = plot.data[0][at];
    const metric = this.state().metric;
    const parts = curves.filter((curve) => !curve.hidden).map(({ label, series }) => {
      const row = series.rowAt(step);
      return `${label.split(" ")[0]} ${row < 0 ? "–" : format(series.view(metric)?.mean[row])}`;
    });
    setText(this.figure.querySelector(".readout"), `step ${whole(step)}: ${parts.join(" · ")}`);
  }

  private rows(): Rows {
    const { metric, curves } = this.state();
    const longest = curves.reduce((most, { series }) => (series.length > most.length ? series : most), curves[0].series);
    const stride = Math.ceil(longest.length / MAX_TABLE_ROWS) || 1;
    const rows = Array.from({ length: Math.floor((longest.length - 1) / stride) + 1 }, (_, i) => {
      const step = longest.step[i * stride];
      return [whole(step), ...curves.map(({ series }) => format(series.view(metric)?.mean[series.rowAt(step)]))];
    });
    return { head: ["step", ...curves.map((curve) => curve.label)], rows };
  }
}
