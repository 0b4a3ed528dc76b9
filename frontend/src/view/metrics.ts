/** The small charts: one for each metric that the run declares, the router's first. Those off the screen are not drawn. */
import { compact, metric, percent } from "../data/format";
import { firstSteps } from "../data/series";
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
  { title: "MaxVio", help: "(load of the busiest expert − mean load) / mean load, mean over layers, in this batch (Wang 2024). 0 is even; E / k − 1 is everything on the same k of E experts. Over a validation set its authors measured 0.5 to 0.7 with an auxiliary loss and 0.04 with a selection bias; single batches lie higher.", match: is("max_vio"), zeroBased: true },
  { title: "Load CV", help: "Standard deviation / mean of the experts' load, mean over layers. 0 is even.", match: is("load_cv"), zeroBased: true },
  { title: "Router entropy", help: "Entropy of the router's distribution in nats, mean over tokens and layers. ln E is no preference at all; near 0 every choice is certain, and no gradient is left to change it.", match: is("router_entropy"), zeroBased: true },
  { title: "Dropped share", help: "Share of the assignments that went over an expert's capacity and were dropped. 0 where routing is dropless.", match: is("dropped_share"), format: (v) => percent(v, 2), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Dead experts", help: "Experts that got no token in this batch, over all layers. In a small batch some are empty by chance; those that stay empty no longer learn.", match: is("dead_experts"), zeroBased: true },
  { title: "Largest logit", help: "The largest logit of all routers. One that keeps rising warns of instability, in bfloat16 above all; a z-loss holds it down (Zoph 2022).", match: is("max_logit") },
  { title: "Balance losses", help: "Each balancing term as it enters the loss: times its weight, summed over layers.", match: (name) => name.startsWith("balance/") },
  { title: "Loss of extra predictions", help: "cross-entropy of tokens further ahead, nats, without its weight", match: is("mtp_loss") },
  { title: "Rerouted", help: "assignments that went from a full expert to the token's next best", match: is("router/rerouted"), format: (v) => percent(v, 2), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Second expert kept", help: "tokens that use their second expert too (GShard)", match: is("router/second_kept"), format: (v) => percent(v, 1), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Tokens without an expert", help: "that no expert chose", match: is("router/unserved_tokens"), format: (v) => percent(v, 1), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "First choice", help: "tokens that got the expert of their highest logit (BASE)", match: is("router/first_choice"), format: (v) => percent(v, 1), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Noise", help: "mean standard deviation of the noise on the router's logits", match: is("router/noise_std"), zeroBased: true },
  { title: "Sinkhorn error", help: "of the most uneven load, relative to an even one", match: is("router/sinkhorn_error"), zeroBased: true },
  { title: "Policy loss", help: "of the router that learns by policy gradient, without its weight", match: is("router/policy_loss") },
  { title: "Gradient norm", help: "Norm of all gradients before clipping. Jumps come before spikes of the loss.", match: is("grad_norm"), zeroBased: true },
  { title: "Learning rate", help: "As the schedule has it, without the router's own factor.", match: is("lr"), zeroBased: true },
  { title: "Tokens per second", help: "Of the training step over all devices, validations and checkpoints left out.", match: is("tokens_per_s"), format: compact, zeroBased: true },
  { title: "MFU", help: "model FLOP utilisation: FLOPs per token (as priced, without recomputation) × tokens per second ÷ the devices' dense peak", match: is("mfu"), format: (v) => percent(v, 1), tick: (v) => percent(v, 0), zeroBased: true },
  { title: "Model TFLOP/s", help: "FLOPs per token (as priced, without recomputation) × tokens per second, over all devices", match: is("tflop_per_s"), zeroBased: true },
  { title: "Step time", help: "Milliseconds of a training step, validations and checkpoints left out.", match: is("step_ms"), zeroBased: true },
  { title: "Memory", help: "The most bytes that the device's tensors have taken so far.", match: is("memory_bytes"), format: compact, zeroBased: true },
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
    el("figcaption", {}, el("h3", {}, panel.title), panel.help ? helpButton(panel) : null, el("output", { className: "readout" })),
    el("p", { className: "muted chart-help", hidden: true }, panel.help),
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

/** Shows what the metric is and how to read it: for a mouse, a finger and a keyboard alike. */
function helpButton(panel: Panel): HTMLElement {
  const button = el("button", { type: "button", className: "icon small", "aria-expanded": "false", "aria-label": `What is ${panel.title}?` }, "?");
  button.addEventListener("click", () => {
    const text = button.closest("figure")!.querySelector<HTMLElement>(".chart-help")!;
    text.hidden = !text.hidden;
    button.setAttribute("aria-expanded", String(!text.hidden));
  });
  return button;
}

function drawingOf(store: RunStore, names: string[]): Drawing | null {
  const { series } = store;
  const columns = names.flatMap((name, i) => {
    const view = series.view(name);
    return view ? [{ line: { label: name.replace("balance/", ""), colour: `--line-${(i % 6) + 1}` }, view }] : [];
  });
  if (!columns.length || !series.length) return null;
  const band = columns.length === 1 && series.level > 1 ? { min: columns[0].view.min, max: columns[0].view.max } : null;
  return { x: series.step.subarray(0, series.length), first: firstSteps(series), lines: columns.map(({ line }) => line), values: columns.map(({ view }) => view.mean), band };
}
