/** Rows that keep themselves true over /ws/runs/: figures are written in place, a changed state fetches the row anew. */
import htmx from "htmx.org";
import { LiveSocket } from "../data/socket";
import { compact, metric, whole } from "../data/format";
import type { LiveMessage, Run } from "../data/types";
import { setText } from "./dom";
import { throttled } from "./frame";

const REFRESH_MS = 2000;
const SPARK_POINTS = 40;

export function initRows(): void {
  const refresh = throttled(REFRESH_MS, refreshList);
  const socket = new LiveSocket({
    path: () => "/ws/runs/",
    onText: (message) => {
      const live = message as LiveMessage;
      if (live.type === "run") hear(live.run, refresh);
      if (live.type === "resync") refresh();
    },
    onStatus: (status) => (document.documentElement.dataset.live = status.kind),
  });
  socket.connect();
}

function hear(run: Run, refresh: () => void): void {
  const row = document.getElementById(`run-${run.id}`);
  if (!row) return void (run.archived || refresh());
  if (row.dataset.state !== run.state) return void fetchRow(row, run);
  const cells: Record<string, string> = {
    steps: `${whole(run.last_step)} / ${whole(run.steps)}`,
    loss: metric(run.summary.loss),
    val_loss: metric(run.best_val_loss),
    max_vio: metric(run.summary.max_vio),
    tokens_per_s: compact(run.tokens_per_s),
    worker: run.worker ?? "–",
  };
  for (const [name, text] of Object.entries(cells)) setText(row.querySelector(`[data-cell="${name}"]`), text);
  const progress = row.querySelector("progress");
  if (progress) progress.value = run.progress;
  extendSpark(row, run.summary.loss);
}

/** A run in another state has another row: other colours, another sparkline. */
async function fetchRow(row: HTMLElement, run: Run): Promise<void> {
  row.dataset.state = run.state;
  const chosen = row.querySelector<HTMLInputElement>("[data-choose]")?.checked ?? false;
  await htmx.ajax("get", `/runs/${run.id}/row`, { target: row, swap: "outerHTML" });
  const fresh = document.getElementById(`run-${run.id}`);
  fresh?.classList.add("fresh");
  const box = fresh?.querySelector<HTMLInputElement>("[data-choose]");
  if (box) box.checked = chosen;
}

/** A run that is not in the list: the list is asked again with its filters, unless the reader is choosing or has paged on. */
function refreshList(): void {
  if (document.querySelector("[data-choose]:checked") || document.querySelectorAll("tr.row").length > 50) return;
  void htmx.ajax("get", location.pathname + location.search, { target: "#runs", select: "#runs", swap: "outerHTML" });
}

const lines = new WeakMap<Element, number[]>();

function extendSpark(row: HTMLElement, loss: number | null | undefined): void {
  const svg = row.querySelector("svg.spark");
  if (!svg || loss === null || loss === undefined || !Number.isFinite(loss)) return;
  const values = lines.get(svg) ?? (svg.getAttribute("data-values") ?? "").split(" ").filter(Boolean).map(Number);
  values.push(loss);
  // Twice too many points: every other one goes, so that the line keeps its whole history.
  const kept = values.length > 2 * SPARK_POINTS ? values.filter((_, i) => i % 2 === 0) : values;
  lines.set(svg, kept);
  if (kept.length < 2) return;
  const low = Math.min(...kept);
  const span = Math.max(...kept) - low || 1;
  const points = kept.map((value, i) => `${((i * 110) / (kept.length - 1)).toFixed(1)},${(24 - ((value - low) / span) * 22).toFixed(1)}`);
  const line = svg.querySelector("polyline") ?? svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  line.setAttribute("points", points.join(" "));
  svg.classList.remove("none");
}
