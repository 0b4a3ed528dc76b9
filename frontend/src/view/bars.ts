/** Utilisation: the chosen layer's experts as bars against the fair share, at the chosen step. */
import { deadCount, fairRatios, maxVio } from "../data/fair";
import { metric, whole } from "../data/format";
import type { RunStore } from "../data/store";
import { initBehind } from "./behind";
import { cssColour, currentTheme, indexOf, onThemeChange } from "./colour";
import { byId, setText } from "./dom";
import { perFrame, watchSize } from "./frame";
import { countsRow, layerRows, whyNoCounts } from "./reading";
import { initSave, type Savable } from "./save";

const HEIGHT = 216;
const PAD = { left: 46, top: 10, bottom: 22 };

export function initBars(store: RunStore): void {
  const canvas = byId<HTMLCanvasElement>("bars-canvas");
  const sorted = byId<HTMLInputElement>("bars-sorted");
  const redraw = perFrame(() => size.visible() && draw(canvas, store, sorted.checked));
  const size = watchSize(canvas.parentElement!, () => redraw());
  store.on(["steps", "cursor", "snapshot", "layer", "expert", "run", "failure"], redraw);
  sorted.addEventListener("change", redraw);
  onThemeChange(redraw);
  initBehind(byId("bars"), () => layerRows(store));
  initSave(byId("bars"), store, () => savable(canvas, store, sorted.checked));
  canvas.addEventListener("click", (event) => {
    const experts = store.run.experts;
    const at = Math.floor(((event.offsetX - PAD.left) / (canvas.clientWidth - PAD.left)) * experts);
    if (at >= 0 && at < experts) store.setExpert(order(layerRatios(store) ?? new Float32Array(experts), sorted.checked)[at]);
  });
}

function layerRatios(store: RunStore): Float32Array | null {
  const row = countsRow(store);
  const tokens = row?.tensors.expert_tokens;
  if (!row || !tokens || store.layer >= row.layers) return null;
  const from = store.layer * row.experts;
  return fairRatios(tokens.subarray(from, from + row.experts), 1, row.experts);
}

/** A row for each bar, in their order. */
function savable(canvas: HTMLCanvasElement, store: RunStore, sorted: boolean): Savable | null {
  const [row, ratios] = [countsRow(store), layerRatios(store)];
  if (!row || !ratios) return null;
  const layer = store.run.moe_layers[store.layer] ?? store.layer;
  const tokens = row.tensors.expert_tokens!.subarray(store.layer * row.experts);
  const rows = order(ratios, sorted).map((expert) => [row.step, layer, expert, ratios[expert], tokens[expert]]);
  return { steps: [row.step, row.step], picture: { canvas, xTitle: `expert of layer ${layer}`, yTitle: "× fair share", keys: [] }, table: { head: ["step", "layer", "expert", "times_fair_share", "tokens"], rows } };
}

const order = (ratios: Float32Array, sorted: boolean): number[] => {
  const indices = [...ratios.keys()];
  return sorted ? indices.sort((a, b) => ratios[b] - ratios[a]) : indices;
};

function draw(canvas: HTMLCanvasElement, store: RunStore, sorted: boolean): void {
  const ratios = layerRatios(store);
  const why = whyNoCounts(store);
  if (ratios || why) byId("bars").classList.toggle("is-empty", !ratios);
  if (!ratios && why) canvas.parentElement!.dataset.empty = why;
  if (!ratios) return;
  const scale = devicePixelRatio || 1;
  const width = canvas.parentElement!.clientWidth;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(HEIGHT * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${HEIGHT}px`;
  const context = canvas.getContext("2d")!;
  context.scale(scale, scale);
  const top = Math.max(2, ...ratios) * 1.05;
  const y = (ratio: number) => HEIGHT - PAD.bottom - (ratio / top) * (HEIGHT - PAD.top - PAD.bottom);
  axes(context, canvas, width, top, y);
  bars(context, canvas, store, ratios, order(ratios, sorted), width, y);
  describe(canvas, store, ratios);
}

function axes(context: CanvasRenderingContext2D, canvas: HTMLCanvasElement, width: number, top: number, y: (ratio: number) => number): void {
  const style = getComputedStyle(canvas);
  context.font = `11px ${style.fontFamily}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const stride = top > 12 ? Math.ceil(top / 6) : top > 6 ? 2 : 1;
  for (let ratio = 0; ratio <= top; ratio += stride) {
    context.fillStyle = style.getPropertyValue("--grid");
    context.fillRect(PAD.left, Math.round(y(ratio)), width - PAD.left, 1);
    context.fillStyle = style.getPropertyValue("--ink-soft");
    context.fillText(`${ratio}×`, PAD.left - 8, y(ratio));
  }
  context.fillStyle = style.getPropertyValue("--ink-soft");
  context.fillRect(PAD.left, Math.round(y(1)), width - PAD.left, 1);
}

function bars(context: CanvasRenderingContext2D, canvas: HTMLCanvasElement, store: RunStore, ratios: Float32Array, indices: number[], width: number, y: (ratio: number) => number): void {
  const style = getComputedStyle(canvas);
  const theme = currentTheme();
  const slot = (width - PAD.left) / indices.length;
  const gap = slot > 6 ? Math.min(slot * 0.2, 6) : slot > 3 ? 1 : 0;
  const stride = Math.max(1, Math.ceil(22 / slot));
  context.textAlign = "center";
  indices.forEach((expert, i) => {
    const x = PAD.left + i * slot + gap / 2;
    const ratio = ratios[expert];
    context.fillStyle = cssColour(theme, indexOf(ratio));
    context.fillRect(x, y(ratio), Math.max(slot - gap, 0.75), y(0) - y(ratio));
    if (slot > 8) {
      context.strokeStyle = style.getPropertyValue(expert === store.expert ? "--ink" : "--bar-edge");
      context.strokeRect(x + 0.5, y(ratio) + 0.5, slot - gap - 1, Math.max(y(0) - y(ratio) - 1, 0));
    }
    context.fillStyle = style.getPropertyValue(ratio === 0 ? "--danger" : expert === store.expert ? "--ink" : "--ink-soft");
    if (i % stride === 0) context.fillText(String(expert), x + (slot - gap) / 2, HEIGHT - 9);
    if (ratio === 0 && slot > 8) context.fillText("×", x + (slot - gap) / 2, y(0) - 8);
  });
}

function describe(canvas: HTMLCanvasElement, store: RunStore, ratios: Float32Array): void {
  const dead = deadCount(ratios);
  const step = countsRow(store)?.step ?? store.step;
  const text = `${step === store.step ? "" : `step ${whole(step)} · `}MaxVio ${metric(maxVio(ratios))}${dead ? ` · ${dead} dead` : ""}`;
  setText(byId("bars").querySelector(".readout"), text);
  canvas.setAttribute("aria-label", `Utilisation of the ${ratios.length} experts of layer ${store.run.moe_layers[store.layer]} at step ${step}: ${text}`);
}
