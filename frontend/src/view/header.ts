/** The head of the run page: state, progress, time left, figures, and the tab's title. */
import { compact, duration, metric, percent, whole } from "../data/format";
import type { RunStore } from "../data/store";
import { TERMINAL, type Run } from "../data/types";
import { all, byId, setText } from "./dom";
import { perFrame } from "./frame";
import { lossName } from "./loss";
import { initWaiting } from "./waiting";

const MARKS: Record<string, string> = { succeeded: "✓", failed: "✕", cancelled: "⊘", paused: "⏸" };

export function initHeader(store: RunStore, waitsFor: string): void {
  const draw = perFrame(() => drawHeader(store, waiting()));
  const waiting = initWaiting(store, waitsFor, draw);
  store.on(["run", "steps", "cursor", "events"], draw);
  setInterval(draw, 1000);
  draw();
}

function drawHeader(store: RunStore, waitsFor: string): void {
  const { run } = store;
  const step = Math.max(store.lastStep, run.last_step);
  const progress = run.steps ? Math.min(step / run.steps, 1) : run.progress;
  const state = byId("state");
  state.dataset.state = run.state;
  setText(state, run.state);
  setText(byId("reason"), reasonText(run) || beforeSteps(store, step, waitsFor));
  byId("reason").classList.toggle("bad", run.state === "failed");
  const bar = byId<HTMLProgressElement>("progress");
  bar.value = progress;
  bar.dataset.state = run.state;
  setText(byId("progress-text"), progressText(run, step, progress));
  for (const node of all("[data-stat]")) setText(node, statText(store, node.dataset.stat!));
  for (const button of all<HTMLElement>("[data-when]")) button.hidden = !button.dataset.when!.split(" ").includes(run.state);
  const mark = TERMINAL.has(run.state) || run.state === "paused" ? MARKS[run.state] : percent(progress, 0);
  document.title = `${mark} ${run.name} · moelab`;
}

function reasonText(run: Run): string {
  const exit = run.exit_code === null || run.exit_code === undefined ? "" : ` (exit code ${run.exit_code})`;
  if (run.state === "failed") return [run.reason.replaceAll("_", " ") + exit, run.detail].filter(Boolean).join(": ");
  if (run.state === "succeeded") return "";
  return run.detail;
}

/** What goes on where no step has been told yet. */
function beforeSteps({ run, every }: RunStore, step: number, waitsFor: string): string {
  if (run.state === "queued") return waitsFor;
  if (run.state === "starting") return "A worker has the run: its trainer reads the data and builds the model.";
  if (run.state !== "running" || step) return "";
  // Nobody knows which steps another trainer tells.
  return every === null ? "Training has begun." : `Training has begun; the first figures come with step ${whole(Math.min(every, run.steps || 1))}.`;
}

function progressText(run: Run, step: number, progress: number): string {
  const steps = run.steps ? `step ${whole(step)} of ${whole(run.steps)}` : `step ${whole(step)}`;
  if (TERMINAL.has(run.state)) return `${steps} · took ${duration(tookSeconds(run))}`;
  const left = run.state === "running" && run.seconds_left !== null ? ` · ${duration(run.seconds_left)} left` : "";
  return `${steps} · ${percent(progress, 0)}${left}`;
}

function tookSeconds(run: Run): number {
  const end = run.ended_at ? new Date(run.ended_at).getTime() : Date.now();
  return run.started_at ? (end - new Date(run.started_at).getTime()) / 1000 : NaN;
}

/** The model's TFLOP/s, and what share of the devices' peak that is where it is known. */
function speedText({ run, seriesAtStep: series, step }: RunStore, value: number | null | undefined): string {
  const row = series.rowAt(step);
  const share = (row >= 0 ? series.view("mfu")?.mean[row] : undefined) ?? run.summary?.mfu;
  return share === undefined || share === null ? compact(value) : `${compact(value)} · ${percent(share, 0)}`;
}

/** A figure of the strip: a metric at the chosen step, or a fact of the run. */
function statText(store: RunStore, stat: string): string {
  const { run, seriesAtStep: series } = store;
  const name = stat === "loss" ? lossName(series) : stat;
  if (name === "val_loss") return metric(run.best_val_loss);
  if (name === "spikes") return String(store.events.filter((event) => event.kind === "spike_detected").length || run.spikes || 0);
  const row = series.length ? Math.max(series.rowAt(store.step), 0) : -1; // before the first that was told: that one
  const value = (row >= 0 ? series.view(name)?.mean[row] : undefined) ?? run.summary?.[name];
  if (name === "tokens_per_s") return compact(store.follow && run.tokens_per_s ? run.tokens_per_s : value);
  if (name === "tflop_per_s") return speedText(store, value);
  if (name === "dropped_share") return value === undefined || value === null ? "–" : percent(value, 1);
  return metric(value);
}
