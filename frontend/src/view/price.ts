/** What the described run costs, by the accountant. */
import { bytes, compact, whole } from "../data/format";
import { byId, el, setText } from "./dom";

export interface Price {
  total_params: number;
  active_params: { with_embeddings: number };
  flops_per_token: { forward: number; training: number };
  bytes: Record<string, number>;
  tokens_per_step: number;
}

/** What the price is shown beside: the run or the Mixture of Experts that the description was made from. */
export interface Compared {
  name: string;
  price: Price;
}

let compared: Compared | null = null;

export function compareWith(other: Compared | null): void {
  compared = other;
  const note = byId("compared");
  note.hidden = other === null;
  setText(note, other ? `In brackets: ${other.name}` : "");
}

export function showPrice(price: Price | null, steps: number): void {
  byId("price").classList.toggle("stale", price === null);
  if (!price) return;
  const tokens = price.tokens_per_step * steps;
  const beside = compared;
  const set = (id: string, text: string, title: string, other?: string) => {
    byId(id).replaceChildren(text, ...(other === undefined ? [] : [" ", el("small", {}, `(${other})`)]));
    byId(id).title = title;
  };
  const count = (id: string, of: (one: Price) => number) =>
    beside ? set(id, compact(of(price)), `${whole(of(price))} (${beside.name}: ${whole(of(beside.price))})`, compact(of(beside.price))) : set(id, compact(of(price)), whole(of(price)));
  count("price-total", (one) => one.total_params);
  count("price-active", (one) => one.active_params.with_embeddings);
  count("price-flops", (one) => one.flops_per_token.training);
  const memory = (one: Price) => bytes(one.bytes.total_per_device ?? NaN);
  set("price-memory", memory(price), "weights, gradients, AdamW's moments and an estimate of the activations", beside ? memory(beside.price) : undefined);
  set("price-tokens", compact(tokens), `${whole(price.tokens_per_step)} in each of ${whole(steps)} steps`);
  set("price-all", flops(tokens * price.flops_per_token.training), "tokens × training FLOPs per token");
}

function flops(count: number): string {
  const power = Math.floor(Math.log10(count) / 3) * 3;
  return Number.isFinite(power) && power >= 15 ? `${(count / 10 ** power).toPrecision(3)}e${power}` : compact(count);
}
