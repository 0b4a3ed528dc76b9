/** Making and revoking tokens. */
import htmx from "htmx.org";
import { ApiError, change } from "../data/api";
import { byId, setText } from "../view/dom";
import { isSure } from "../view/sure";
import { tellError, toast } from "../view/toast";

const DAY_MS = 86_400_000;
const form = byId<HTMLFormElement>("token-form");

const refresh = (): Promise<void> => htmx.ajax("get", location.pathname, { target: "#tokens", select: "#tokens", swap: "outerHTML" });

async function create(): Promise<void> {
  const data = new FormData(form);
  const days = Number(data.get("days"));
  const token = await change<{ secret: string }>("POST", "/tokens", {
    name: data.get("name"),
    scopes: data.getAll("scopes"),
    project: data.get("project") || null,
    expires_at: days ? new Date(Date.now() + days * DAY_MS).toISOString() : null,
  });
  setText(byId("token-error"), "");
  byId<HTMLInputElement>("token-value").value = token.secret;
  byId("token-shown").hidden = false;
  byId<HTMLInputElement>("token-value").select();
  form.reset();
  await refresh();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  create().catch((error: unknown) => {
    if (!(error instanceof ApiError)) return tellError(error);
    setText(byId("token-error"), [error.message, ...(error.problem.errors ?? []).map((one) => one.detail)].join(" · "));
  });
});

document.addEventListener("click", (event) => {
  const button = (event.target as Element).closest<HTMLButtonElement>("[data-revoke]");
  if (!button) return;
  if (!isSure(button, "Really revoke?", event)) return; // what used the token stops at once
  change("DELETE", `/tokens/${button.dataset.revoke}`).then(() => {
    toast("Revoked");
    return refresh();
  }, tellError);
});
