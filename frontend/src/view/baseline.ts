/** The dense model to compare a Mixture of Experts with: one click makes the description dense, as wide as costs the same. */
import { change } from "../data/api";
import { getPath, isObject, type PlainObject } from "../data/paths";
import { all, byId } from "./dom";
import type { Compared, Price } from "./price";
import { tellError } from "./toast";

type Answer = { spec: PlainObject; price: Price; compared_with: Price };

/** `use` takes the dense spec, and what the one that it was made from costs. */
export function initBaseline(current: () => PlainObject, use: (spec: PlainObject, compared: Compared) => void): void {
  for (const button of all<HTMLButtonElement>("[data-baseline]")) {
    button.addEventListener("click", () => void take(button).catch(tellError).finally(() => (button.disabled = false)));
  }

  async function take(button: HTMLButtonElement): Promise<void> {
    button.disabled = true;
    const asked = current();
    const answer = await change<Answer>("POST", "/specs/dense-baseline", { spec: asked, equal: button.dataset.baseline! });
    use(answer.spec, { name: String(asked.name ?? "the Mixture of Experts"), price: answer.compared_with });
  }
}

/** The buttons are there for a spec that has experts. A spec that says nothing of them has the default ones. */
export function showBaseline(spec: PlainObject): void {
  const moe = getPath(spec, "model.moe");
  byId("baseline").hidden = !(moe === undefined || isObject(moe));
}
