/** The page of a new run: form and YAML say the same, the accountant prices it, errors stand at their fields. */
import { parseDocument, stringify } from "yaml";
import { ApiError, change, getJson } from "../data/api";
import { getPath, inOrderOf, isObject, type Plain, type PlainObject } from "../data/paths";
import type { Run } from "../data/types";
import { byId, el, pageData } from "../view/dom";
import { debounced } from "../view/frame";
import { initBaseline, showBaseline } from "../view/baseline";
import { initConfigImport } from "../view/config-import";
import { clearErrors, focusFirst, initProblems, showErrors } from "../view/spec-errors";
import { readForm, showParts, writeForm } from "../view/spec-form";
import { compareWith, showPrice, type Compared, type Price } from "../view/price";
import { tellError } from "../view/toast";

const form = byId<HTMLFormElement>("spec-form");
const yaml = byId<HTMLTextAreaElement>("yaml");
const launch = byId<HTMLButtonElement>("launch");
const preset = byId<HTMLSelectElement>("preset");
const initial = pageData<PlainObject>("spec-data");
/** What the language has where a spec says nothing. */
const defaults = pageData<PlainObject>("defaults-data");
let spec: PlainObject = initial;
/** The spec as it was taken whole, before anything was changed in it, and the preset that it was. */
let taken = { spec: initial, preset: preset.value };
let abort = new AbortController();
/** Whether the YAML can be read; while it cannot, there is nothing to check. */
let readable = true;
/** One key for one description: pressing Launch twice makes one run. */
let submission = crypto.randomUUID();

const check = debounced(250, () => void validate().catch(tellError));

function setSpec(next: PlainObject, from: "form" | "yaml" | "both"): void {
  spec = next;
  readable = true;
  submission = crypto.randomUUID();
  byId("preset-said").hidden = true;
  if (from !== "form") writeForm(form, spec, defaults);
  if (from !== "yaml") yaml.value = stringify(spec, { lineWidth: 0 });
  byId("yaml-text").textContent = yaml.value;
  showBaseline(spec);
  check();
}

async function validate(): Promise<void> {
  abort.abort();
  if (!readable) return;
  abort = new AbortController();
  const { signal } = abort;
  const asked = spec;
  const steps = Number(getPath(asked, "training.steps") ?? getPath(defaults, "training.steps")) || 0;
  try {
    const answer = await change<{ price: Price }>("POST", "/runs/validate", { spec: asked }, {}, signal);
    clearErrors(form);
    showPrice(answer.price, steps);
  } catch (error) {
    if (!(error instanceof ApiError) || error.problem.status !== 422) throw error;
    showErrors(form, asked, error.problem, jump);
    // What cannot be trained here can often still be priced.
    const priced = await change<Price | { price: Price }>("POST", "/price", { spec: asked }, {}, signal).catch(() => null);
    showPrice(priced && "price" in priced ? priced.price : priced, steps);
  }
}

function readYaml(): void {
  const document = parseDocument(yaml.value, { uniqueKeys: true });
  const wrong = document.errors[0];
  const plain = wrong ? null : (document.toJS({ maxAliasCount: 0 }) as Plain);
  byId("yaml-text").textContent = yaml.value;
  if (wrong || !isObject(plain)) {
    readable = false;
    abort.abort();
    const at = wrong?.linePos?.[0];
    const detail = wrong ? `line ${at?.line ?? "?"}: ${wrong.message.split("\n")[0]}` : "a spec is a mapping of fields";
    showErrors(form, spec, { title: detail, status: 422 }, () => yaml.focus());
    showPrice(null, 0);
    return;
  }
  // A clone keeps of its parent what is not said.
  setSpec(form.dataset.parent ? { ...initial, ...plain } : plain, "yaml");
}

/** Puts the caret where `path` stands in the YAML. */
function jump(path: string): void {
  const document = parseDocument(yaml.value);
  const keys = path.split(".").map((key) => (/^\d+$/.test(key) ? Number(key) : key));
  let node: unknown;
  while (keys.length && !(node = document.getIn(keys, true))) keys.pop();
  const range = (node as { range?: [number, number] } | undefined)?.range;
  yaml.focus();
  if (range) yaml.setSelectionRange(range[0], range[1]);
}

async function usePreset(name: string): Promise<void> {
  const next = name ? (await getJson<{ spec: PlainObject }>(`/presets/${encodeURIComponent(name)}`)).spec : initial;
  if (preset.value !== name) return; // another one was chosen meanwhile
  compareWith(name ? null : pageData<Compared | null>("compared-data"));
  const before = { spec, unreadable: readable ? null : yaml.value, preset: taken.preset, changed: spec !== taken.spec || !readable };
  takeWhole(next);
  sayTaken(before);
}

function takeWhole(next: PlainObject): void {
  taken = { spec: next, preset: preset.value };
  setSpec(next, "both");
}

/** Says that every field is the preset's now, and offers what the reader had changed in the one before. */
function sayTaken(before: { spec: PlainObject; unreadable: string | null; preset: string; changed: boolean }): void {
  const said = byId("preset-said");
  const back = el("button", { type: "button", className: "plain small" }, "Take them back");
  back.addEventListener("click", () => {
    taken.preset = preset.value = before.preset;
    setSpec(before.spec, "both");
    if (before.unreadable === null) return;
    yaml.value = before.unreadable;
    readYaml();
  });
  const title = preset.selectedOptions[0]?.text.trim() ?? "";
  said.replaceChildren(`Every field is as in ${title} now${before.changed ? "; your changes are gone. " : "."}`, ...(before.changed ? [back] : []));
  said.hidden = false;
}

async function submit(): Promise<void> {
  if (!readable) return yaml.focus();
  const tags = byId<HTMLInputElement>("run-tags").value.split(",").map((tag) => tag.trim()).filter(Boolean);
  const project = byId<HTMLSelectElement>("run-project").value;
  const body: PlainObject = { spec, tags, ...(project && { project }) };
  launch.disabled = true;
  launch.setAttribute("aria-busy", "true");
  try {
    const run = form.dataset.parent ? await submitClone(Number(form.dataset.parent), body) : await change<Run>("POST", "/runs", body, { "Idempotency-Key": submission });
    location.assign(`/runs/${run.id}`);
  } catch (error) {
    launch.disabled = false;
    launch.removeAttribute("aria-busy");
    if (!(error instanceof ApiError) || error.problem.status !== 422) return tellError(error);
    showErrors(form, spec, error.problem, jump);
    focusFirst(form);
  }
}

/** A clone keeps its parent, so that the run page can show what differs. */
function submitClone(parent: number, body: PlainObject): Promise<Run> {
  const set = Object.fromEntries(Object.keys(spec).filter((key) => key !== "name").map((key) => [key, spec[key]]));
  return change<Run>("POST", `/runs/${parent}/clone`, { set, name: spec.name ?? "untitled" }, { "Idempotency-Key": submission }).then(async (run) => {
    if ((body.tags as string[]).length) await change("PATCH", `/runs/${run.id}`, { tags: body.tags });
    return run;
  });
}

form.addEventListener("input", (event) => {
  if ((event.target as Element).closest(".preset-row, .config-import")) return;
  showParts(form);
  setSpec(inOrderOf(readForm(form), spec) as PlainObject, "form");
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  void submit();
});
yaml.addEventListener("input", debounced(250, readYaml));
preset.addEventListener("change", () => {
  const name = preset.value;
  usePreset(name).catch((error) => {
    if (preset.value === name) preset.value = taken.preset;
    tellError(error);
  });
});
initProblems(form);
initConfigImport(takeWhole);
initBaseline(() => spec, (dense, compared) => {
  compareWith(compared);
  takeWhole(dense);
});
compareWith(pageData<Compared | null>("compared-data"));
setSpec(initial, "both");
