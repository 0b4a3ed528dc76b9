/** Dark, light, or as the system has it. The choice is a cookie, so that the server renders it and nothing flashes. */
import { currentTheme } from "./colour";

const YEAR_S = 31_536_000;

export function initTheme(): void {
  const button = document.getElementById("theme");
  button?.addEventListener("click", () => {
    const theme = currentTheme() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    document.cookie = `theme=${theme}; path=/; max-age=${YEAR_S}; samesite=lax`;
  });
}
