/** A published model's config.json, from a file or pasted, becomes the description in the form. */
import { ApiError, change } from "../data/api";
import { isObject, type Plain, type PlainObject } from "../data/paths";
import { byId } from "./dom";
import { tellError } from "./toast";

type Imported = { family: string; spec: PlainObject; problems: { pointer: string; detail: string }[]; notes: string[] };

/** `use` takes the spec that the server has made of it. */
export function initConfigImport(use: (spec: PlainObject) => void): void {
  const file = byId<HTMLInputElement>("config-file");
  const text = byId<HTMLTextAreaElement>("config-text");
  const said = byId("config-said");

  const say = (words: string, bad = false): void => {
    said.textContent = words;
    said.hidden = !words;
    said.classList.toggle("bad", bad);
  };

  async function read(content: string): Promise<void> {
    if (!content.trim()) return say("");
    let config: Plain;
    try {
      config = JSON.parse(content) as Plain;
    } catch (error) {
      return say(`not JSON: ${(error as Error).message}`, true);
    }
    if (!isObject(config)) return say("a config.json is a mapping of fields", true);
    try {
      const imported = await change<Imported>("POST", "/import-config", config);
      use(imported.spec);
      const untrained = imported.problems.map(({ detail }) => detail).join(" · ");
      say([`Read as ${imported.family}.`, untrained && `Not trained here: ${untrained}`, ...imported.notes].filter(Boolean).join(" "));
    } catch (error) {
      if (!(error instanceof ApiError) || error.problem.status >= 500) return tellError(error);
      const problems = error.problem.errors ?? [];
      say(problems.length ? problems.map(({ detail }) => detail).join(" · ") : error.message, true);
    }
  }

  file.addEventListener("change", () => {
    const [chosen] = file.files ?? [];
    if (chosen) void chosen.text().then((content) => ((text.value = content), read(content))).catch(tellError);
  });
  byId("config-read").addEventListener("click", () => void read(text.value).catch(tellError));
}
