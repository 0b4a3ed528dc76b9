/** The loss: training loss (smoothed if asked), validation points, and spikes where the loss left its recent past. */
import type uPlot from "uplot";
import { metric } from "../data/format";
import { ema } from "../data/smooth";
import { spikesOf, valPoints } from "../data/marks";
import { firstSteps, type Series } from "../data/series";
import type { RunStore } from "../data/store";
import { byId, readStored, store as keep } from "./dom";
import { LineChart, type Drawing } from "./lines";

/** Half of the largest mark, in CSS pixels: one at the first or the last step is shown whole. */
const MARK = 6;

export function initLoss(store: RunStore): void {
  const figure = byId("loss");
  const log = byId<HTMLInputElement>("loss-log");
  const smooth = byId<HTMLSelectElement>("loss-smooth");
  log.checked = readStored("loss-log") === "1";
  smooth.value = readStored("loss-smooth") ?? "0";
  const chart = new LineChart(figure, store, {
    title: "Loss",
    empty: () => store.failures.get(store.range ? "zoom" : "whole"),
    drawing: () => lossDrawing(store, Number(smooth.value)),
    log: () => log.checked,
    yTitle: "nats per token",
    marks: [
      { label: "validation", colour: "--line-2", shape: "dot" },
      { label: "spike", colour: "--danger", shape: "triangle" },
    ],
    over: (plot) => drawMarks(plot, store, getComputedStyle(figure)),
  });
  for (const control of [log, smooth]) {
    control.addEventListener("change", () => {
      keep("loss-log", log.checked ? "1" : "0");
      keep("loss-smooth", smooth.value);
      chart.redraw();
    });
  }
  store.on("events", chart.redraw);
}

/** The metric that the page calls the loss: without balancing terms and extra predictions, where the run tells it apart. */
export function lossName(series: Series): string {
  return series.columns.has("lm_loss") ? "lm_loss" : "loss";
}

function lossDrawing(store: RunStore, weight: number): Drawing | null {
  const { series } = store;
  const name = lossName(series);
  const column = series.view(name);
  if (!column || !series.length) return null;
  const x = series.step.subarray(0, series.length);
  const line = { label: name === "lm_loss" ? "Cross-entropy" : "Loss", colour: "--line-1" };
  const band = series.level > 1 ? { min: column.min, max: column.max } : null;
  const first = firstSteps(series);
  if (!weight) return { x, first, lines: [line], values: [column.mean], band };
  return { x, first, lines: [{ ...line, faint: true }, { ...line, width: 2 }], values: [column.mean, ema(column.mean, weight)], band };
}

function drawMarks(plot: uPlot, store: RunStore, style: CSSStyleDeclaration): void {
  const { ctx, bbox } = plot;
  const { from, to } = store.shown;
  const px = devicePixelRatio || 1;
  const shown = <T extends { step: number }>(marks: T[]) => marks.filter((mark) => mark.step >= from && mark.step <= to);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left - MARK * px, bbox.top, bbox.width + 2 * MARK * px, bbox.height);
  ctx.clip();
  ctx.fillStyle = ctx.strokeStyle = style.getPropertyValue("--danger");
  for (const spike of shown(spikesOf(store.events))) {
    const x = plot.valToPos(spike.step, "x", true);
    ctx.globalAlpha = 0.35;
    ctx.fillRect(x - px / 2, bbox.top, px, bbox.height);
    ctx.globalAlpha = 1;
    triangle(ctx, x, bbox.top + 1, 5 * px);
  }
  ctx.fillStyle = style.getPropertyValue("--line-2");
  ctx.strokeStyle = style.getPropertyValue("--surface");
  ctx.lineWidth = 1.5 * px;
  for (const point of shown(valPoints(store.events))) {
    ctx.beginPath();
    ctx.arc(plot.valToPos(point.step, "x", true), plot.valToPos(point.loss, "y", true), 4 * px, 0, 2 * Math.PI);
    ctx.fill();
    ctx.stroke();
  }
  ctx.restore();
}

function triangle(ctx: CanvasRenderingContext2D, x: number, top: number, size: number): void {
  ctx.beginPath();
  ctx.moveTo(x - size, top);
  ctx.lineTo(x + size, top);
  ctx.lineTo(x, top + size * 1.5);
  ctx.fill();
}

/** What the spike marks say in words, for the list of events. */
export const spikeText = (loss: number, median: number, score: number): string => `loss ${metric(loss)} against a median of ${metric(median)} (${metric(score)} deviations)`;
