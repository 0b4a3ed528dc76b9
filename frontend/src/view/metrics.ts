/** The small charts: one for each metric that the run declares, the router's first. Those off the screen are not drawn. */
import { compact, metric, percent } from "../data/format";
import type { RunStore } from "../data/store";
import { byId, el } from "./dom";
import { LineChart, type Drawing } from "./lines";

interface Panel {
  title: string;
  help: string;
  match: (name: string) => boolean;
  format?: (value: number) => string;
  tick?: (value: number) => string;
  zeroBased?: boolean;
}

const is = (name: string) => (other: string) => other === name;

const PANELS: Panel[] = [
  { title: "MaxVio", help: "(most loaded − mean) / mean, mean over layers; 0 is even", match: is("max_vio"), zeroBased: true },
  { title: "Load CV", help: "standard deviation / mean of the experts' load", match: is("load_cv"), zeroBased: true },
  { title: "Router entropy", help: "nats, mean over tokens and layers", match: is("router_entropy"), zeroBased: true },
  { title: "Dropped share", help: "assignments that capacity dropped", match: is("dropped_share"), format: (v) => percent(v, 2), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Dead experts", help: "experts without a token, over all layers", match: is("dead_experts"), zeroBased: true },
  { title: "Largest logit", help: "of the routers; a rising one warns of instability", match: is("max_logit") },
  { title: "Balance losses", help: "weighted, summed over layers", match: (name) => name.startsWith("balance/") },
  { title: "Loss of extra predictions", help: "cross-entropy of tokens further ahead, nats, without its weight", match: is("mtp_loss") },
  { title: "Rerouted", help: "assignments that went from a full expert to the token's next best", match: is("router/rerouted"), format: (v) => percent(v, 2), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Second expert kept", help: "tokens that use their second expert too (GShard)", match: is("router/second_kept"), format: (v) => percent(v, 1), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Tokens without an expert", help: "that no expert chose", match: is("router/unserved_tokens"), format: (v) => percent(v, 1), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "First choice", help: "tokens that got the expert of their highest logit (BASE)", match: is("router/first_choice"), format: (v) => percent(v, 1), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Noise", help: "mean standard deviation of the noise on the router's logits", match: is("router/noise_std"), zeroBased: true },
  { title: "Sinkhorn error", help: "of the most uneven load, relative to an even one", match: is("router/sinkhorn_error"), zeroBased: true },
  { title: "Policy loss", help: "of the router that learns by policy gradient, without its weight", match: is("router/policy_loss") },
  { title: "Gradient norm", help: "before clipping", match: is("grad_norm"), zeroBased: true },
  { title: "Learning rate", help: "", match: is("lr"), zeroBased: true },
  { title: "Tokens per second", help: "", match: is("tokens_per_s"), format: compact, zeroBased: true },
  { title: "MFU", help: "model FLOP utilisation: FLOPs per token (as priced, without recomputation) × tokens per second ÷ the devices' dense peak", match: is("mfu"), format: (v) => percent(v, 1), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Model TFLOP/s", help: "FLOPs per token (as priced, without recomputation) × tokens per second, over all devices", match: is("tflop_per_s"), zeroBased: true },
  { title: "Step time", help: "milliseconds", match: is("step_ms"), zeroBased: true },
  { title: "Memory", help: "bytes", match: is("memory_bytes"), format: compact, zeroBased: true },
];
const ELSEWHERE = new Set(["loss", "lm_loss"]);
const MAX_CHARTS = 80;

export function initMetrics(store: RunStore): void {
  const grid = byId("metrics");
  const made = new Set<string>();
  const sync = () => {
    const names = store.run.metric_names.length ? store.run.metric_names : [...store.whole.columns.keys()];
    for (const [panel, members] of panelsFor(names)) {
      const key = `${panel.title}/${members.join()}`;
      if (made.has(key) || made.size >= MAX_CHARTS) continue;
      made.add(key);
      addPanel(grid, store, panel, members);
    }
    grid.classList.toggle("is-empty", made.size === 0);
  };
  store.on("run", sync);
  sync();
}

/** The panels for these metrics, in order; a metric that no panel knows gets its own. */
export function panelsFor(names: string[]): [Panel, string[]][] {
  const known: [Panel, string[]][] = PANELS.map((panel) => [panel, names.filter(panel.match)]);
  const taken = new Set([...ELSEWHERE, ...known.flatMap(([, members]) => members)]);
  const others: [Panel, string[]][] = names.filter((name) => !taken.has(name)).map((name) => [{ title: name, help: "", match: is(name) }, [name]]);
  return [...known.filter(([, members]) => members.length), ...others];
}

function addPanel(grid: HTMLElement, store: RunStore, panel: Panel, names: string[]): void {
  const figure = el(
    "figure",
    { className: "card chart small is-empty" },
    el("figcaption", {}, el("h3", { title: panel.help }, panel.title), el("output", { className: "readout" })),
    el("div", { className: "plot", role: "img", "aria-label": `${panel.title}: no data yet` }),
    el("details", { className: "behind" }, el("summary", {}, "Table")),
  );
  grid.append(figure);
  new LineChart(figure, store, {
    title: panel.title,
    height: 132,
    drawing: () => drawingOf(store, names),
    format: panel.format ?? metric,
    tick: panel.tick ?? panel.format ?? metric,
    zeroBased: panel.zeroBased ?? false,
  });
}

function drawingOf(store: RunStore, names: string[]): Drawing | null {
  const { series } = store;
  const columns = names.flatMap((name, i) => {
    const view = series.view(name);
    return view ? [{ line: { label: name.replace("balance/", ""), colour: `--line-${(i % 6) + 1}` }, view }] : [];
  });
  if (!columns.length || !series.length) return null;
  const band = columns.length === 1 && series.level > 1 ? { min: columns[0].view.min, max: columns[0].view.max } : null;
  return { x: series.step.subarray(0, series.length), lines: columns.map(({ line }) => line), values: columns.map(({ view }) => view.mean), band };
}
