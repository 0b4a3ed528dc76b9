/** What REST and the live socket say, as in docs/protocol.md sections 6-8. */

export type State = "queued" | "starting" | "running" | "pausing" | "paused" | "stopping" | "succeeded" | "failed" | "cancelled";

export const TERMINAL: ReadonlySet<string> = new Set<State>(["succeeded", "failed", "cancelled"]);

export interface Run {
  id: number;
  project: string;
  owner: string;
  name: string;
  state: State;
  reason: string;
  detail: string;
  exit_code: number | null;
  signal: number | null;
  attempt: number;
  desired: string;
  parent: number | null;
  tags: string[];
  notes: string;
  starred: boolean;
  archived: boolean;
  created_at: string;
  started_at: string | null;
  ended_at: string | null;
  updated_at: string;
  worker: string | null;
  devices: string[];
  device_names: string[];
  steps: number;
  last_step: number;
  progress: number;
  tokens_per_s: number | null;
  seconds_left: number | null;
  summary: Record<string, number | null>;
  best_val_loss: number | null;
  total_params: number | null;
  active_params: number | null;
  spikes: number;
  layers: number;
  moe_layers: number[];
  experts: number;
  top_k: number;
  metric_names: string[];
  ops: Record<string, string>;
  versions?: Record<string, string>;
  balance_terms?: string[];
  phases?: string[];
  resumed_from_step: number | null;
  url: string;
}

export interface SpikeLayer {
  layer: number;
  max_vio: number;
  max_vio_before: number;
  dead: number;
  top_expert: number;
  top_share: number;
  entropy: number;
}

/** An event of a run: `kind` names it, `body` has the other fields of `spec.events`. */
export interface RunEvent {
  id: number;
  kind: string;
  attempt: number;
  step: number | null;
  at: string;
  body: Record<string, unknown>;
}

export interface Problem {
  title: string;
  status: number;
  detail?: string;
  errors?: { pointer?: string; detail: string }[];
}

/** The header of a `steps` block. */
export interface StepsHeader {
  run: number;
  level: number;
  from: number;
  to: number;
  total: number;
  names: string[];
  moe_layers: number[];
  n_experts: number;
  top_k: number;
}

export type LiveMessage =
  | { type: "hello"; run: Run; last_step: number; last_event: number }
  | { type: "run"; run: Run }
  | { type: "event"; event: RunEvent }
  | { type: "log"; offset: number; text: string }
  | { type: "resync"; from_step: number; last_event: number }
  | { type: "pong" };
