/** What the described run costs, by the accountant. */
import { bytes, compact, whole } from "../data/format";
import { byId, setText } from "./dom";

export interface Price {
  total_params: number;
  active_params: { with_embeddings: number };
  flops_per_token: { forward: number; training: number };
  bytes: Record<string, number>;
  tokens_per_step: number;
}

export function showPrice(price: Price | null, steps: number): void {
  byId("price").classList.toggle("stale", price === null);
  if (!price) return;
  const tokens = price.tokens_per_step * steps;
  const set = (id: string, text: string, title: string) => {
    setText(byId(id), text);
    byId(id).title = title;
  };
  set("price-total", compact(price.total_params), whole(price.total_params));
  set("price-active", compact(price.active_params.with_embeddings), whole(price.active_params.with_embeddings));
  set("price-flops", compact(price.flops_per_token.training), whole(price.flops_per_token.training));
  set("price-memory", bytes(price.bytes.total_per_device ?? NaN), "weights, gradients, AdamW's moments and an estimate of the activations");
  set("price-tokens", compact(tokens), `${whole(price.tokens_per_step)} in each of ${whole(steps)} steps`);
  set("price-all", flops(tokens * price.flops_per_token.training), "tokens × training FLOPs per token");
}

function flops(count: number): string {
  const power = Math.floor(Math.log10(count) / 3) * 3;
  return Number.isFinite(power) && power >= 15 ? `${(count / 10 ** power).toPrecision(3)}e${power}` : compact(count);
}
