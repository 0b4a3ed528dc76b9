/** The page that writes text with a run's checkpoint: asks, looks until it is there, and shows which experts took each token. */
import { ApiError, change } from "../data/api";
import { ask, follow, isPending, trainingLoad, type Generation, type Written } from "../data/generation";
import type { Run } from "../data/types";
import { all, byId, el, pageData, setText } from "../view/dom";
import { tellError } from "../view/toast";
import { Usage } from "../view/usage";
import { WrittenText } from "../view/written";

const { run, chosen } = pageData<{ run: Run; chosen: Generation | null }>("generate-data");
const text = new WrittenText();
const layerSelect = byId<HTMLSelectElement>("written-layer");
const usage = new Usage((row) => chooseLayer(row));
let looking: AbortController | null = null;
/** The text whose experts are shown; what is fetched for an earlier one comes too late. */
let shown: Written | null = null;

function chooseLayer(row: number): void {
  layerSelect.value = String(row);
  text.colour(row);
  usage.mark(row);
}

function show(generation: Generation): void {
  byId("generation").hidden = false;
  byId("generation").setAttribute("aria-busy", String(isPending(generation)));
  const state = byId("generation-state");
  state.dataset.state = generation.state;
  setText(state, generation.state);
  const { result } = generation;
  const about = [`#${generation.id}`, generation.step === null ? "" : `step ${generation.step.toLocaleString("en-US")}`, generation.worker && `on ${generation.worker}`];
  if (result) about.push(`${result.ids.length - result.prompt_tokens} tokens in ${result.seconds} s`, result.stopped === "end_of_document" ? "the document ended" : "");
  setText(byId("generation-about"), about.filter(Boolean).join(" · "));
  const reason = byId("generation-reason");
  reason.hidden = generation.state !== "failed";
  setText(reason, [generation.reason.replaceAll("_", " "), generation.detail].filter(Boolean).join(": "));
  byId("written").hidden = !result;
  shown = null;
  if (!result) byId("usage").hidden = true;
  byId("token-card").hidden = !result?.moe_layers.length;
  byId("generation-notes").replaceChildren(...(result?.notes ?? []).map((note) => el("p", { className: "note" }, note)));
  byId("written-layer-field").hidden = !result?.moe_layers.length;
  if (result) void showResult(result).catch(tellError);
}

async function showResult(written: Written): Promise<void> {
  const layer = Math.min(text.layer, Math.max(written.moe_layers.length - 1, 0));
  layerSelect.replaceChildren(...written.moe_layers.map((number, row) => el("option", { value: row }, `layer ${number}`)));
  text.draw(written);
  chooseLayer(layer);
  if (!written.moe_layers.length) return;
  shown = written;
  usage.show(written, null);
  const load = await trainingLoad(run.id, written);
  if (shown === written) usage.show(written, load);
}

function look(id: number): void {
  looking?.abort();
  looking = new AbortController();
  void follow(run.id, id, show, looking.signal).catch(tellError);
}

function wanted(form: HTMLFormElement): Record<string, unknown> {
  const data = new FormData(form);
  const step = String(data.get("step") ?? "");
  const numbers = ["temperature", "top_p", "tokens", "top_k", "seed"].map((name) => [name, Number(data.get(name))]);
  return { prompt: String(data.get("prompt") ?? "").replaceAll("\r\n", "\n"), ...Object.fromEntries(numbers), ...(step ? { step: Number(step) } : {}) };
}

function initForm(form: HTMLFormElement): void {
  const error = byId("generate-error");
  const button = byId<HTMLButtonElement>("generate-send");
  for (const output of all<HTMLOutputElement>("output[for]", form)) {
    const input = byId<HTMLInputElement>(output.htmlFor.value);
    setText(output, input.value); // a slider does not reach every value that REST takes
    input.addEventListener("input", () => setText(output, input.value));
  }
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (button.disabled) return;
    button.disabled = true;
    setText(error, "");
    ask(run.id, wanted(form))
      .then((made) => {
        history.replaceState(null, "", `?id=${made.id}`);
        addToList(made);
        look(made.id);
      })
      .catch((failure: unknown) => {
        if (failure instanceof ApiError) setText(error, failure.problem.errors?.map(({ detail }) => detail).join("; ") || failure.message);
        else tellError(failure);
      })
      .finally(() => (button.disabled = false));
  });
}

function addToList(made: Generation): void {
  const link = el("a", { href: `?id=${made.id}` }, `#${made.id} ${made.prompt.slice(0, 60) || "(no prompt)"}`);
  byId("generations").prepend(el("li", {}, link, " ", el("span", { className: "muted" }, "just now")));
  byId("generations").closest("section")!.hidden = false;
}

/** Forgets the generation that is shown. */
function initDelete(button: HTMLElement): void {
  button.addEventListener("click", () => {
    const id = new URLSearchParams(location.search).get("id");
    if (!id) return;
    looking?.abort();
    change("DELETE", `/runs/${run.id}/generations/${id}`).then(() => location.assign(location.pathname), tellError);
  });
}

layerSelect.addEventListener("change", () => chooseLayer(Number(layerSelect.value)));
const form = document.getElementById("generate-form");
if (form instanceof HTMLFormElement) initForm(form);
const remove = document.getElementById("generation-delete");
if (remove) initDelete(remove);
if (chosen) look(chosen.id);
