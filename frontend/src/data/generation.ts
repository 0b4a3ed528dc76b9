/** A generation as REST tells it: the text token by token, and which experts took each token in each MoE layer. */
import { ApiError, change, getBlock, getJson } from "./api";
import { decodeSteps } from "./steps";

export interface Written {
  step: number;
  prompt_tokens: number;
  stopped: "length" | "end_of_document";
  ids: number[];
  texts: string[];
  log_probs: (number | null)[];
  moe_layers: number[];
  n_experts: number;
  /** [token][layer][chosen], as `gates`. */
  experts: number[][][];
  gates: number[][][];
  /** [layer][expert]: tokens that the expert took. */
  usage: number[][];
  batch_dependent: boolean;
  notes: string[];
  seconds: number;
}

export interface Generation {
  id: number;
  run: number;
  prompt: string;
  state: "queued" | "running" | "succeeded" | "failed";
  reason: string;
  detail: string;
  step: number | null;
  worker: string | null;
  result?: Written | null;
}

const LOOK_MS = 600;
/** Steps before the checkpoint whose load the text is compared with. */
export const TRAINING_STEPS = 20;

export const isPending = (generation: Generation): boolean => generation.state === "queued" || generation.state === "running";

export const ask = (run: number, wanted: Record<string, unknown>): Promise<Generation> => change<Generation>("POST", `/runs/${run}/generations`, wanted, { "Idempotency-Key": crypto.randomUUID() });

/** How many looks in a row may fail while the server is away. */
const MAX_MISSES = 100;

/** Looks until the generation has ended, and tells of each look. A server that is away for a while is borne. */
export async function follow(run: number, id: number, tell: (generation: Generation) => void, signal: AbortSignal): Promise<void> {
  for (let misses = 0; ; ) {
    try {
      const generation = await getJson<Generation>(`/runs/${run}/generations/${id}`, signal);
      misses = 0;
      tell(generation);
      if (!isPending(generation)) return;
    } catch (error) {
      const away = error instanceof ApiError && (error.problem.status === 0 || error.problem.status >= 500);
      if (!away || ++misses > MAX_MISSES) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 5 * LOOK_MS : LOOK_MS));
    if (signal.aborted) return;
  }
}

/** Tokens of each [layer, expert] that `written` names, over the last steps of training up to its checkpoint; null where nothing was recorded. */
export async function trainingLoad(run: number, written: Written): Promise<Float64Array | null> {
  const from = Math.max(1, written.step - TRAINING_STEPS + 1);
  const rows = decodeSteps(await getBlock(`/runs/${run}/steps?from=${from}&to=${written.step}&points=2000&scalars=&tensors=expert_tokens`));
  const counts = rows.tensors.expert_tokens;
  const experts = written.n_experts;
  if (!counts?.data.length || counts.shape[2] !== experts) return null;
  const sums = new Float64Array(written.moe_layers.length * experts);
  for (const [row, layer] of written.moe_layers.entries()) {
    // Training may know more layers than write: those that predict further ahead.
    const at = rows.moe_layers.indexOf(layer);
    if (at < 0) return null;
    for (let i = 0; i < counts.shape[0]; i++) for (let e = 0; e < experts; e++) sums[row * experts + e] += counts.data[(i * counts.shape[1] + at) * experts + e];
  }
  return sums;
}

/** A token's text as one can see it: white space gets a sign before it. */
export function visible(text: string): string {
  if (text === "") return "·";
  return text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
}

/** The hue of one of `experts`, in degrees: evenly spread where they are few, else by the golden angle, which keeps neighbours apart. */
export const hueOf = (expert: number, experts: number): number => Math.round((expert * (experts <= 16 ? 360 / experts : 137.508) + 25) % 360);
