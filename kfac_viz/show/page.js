"use strict";
const d = JSON.parse(document.getElementById("data").textContent), at = id => document.getElementById(id);
const raised = p => "10" + [...String(p)].map(c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] || "⁻").join("");
/* A number to so many digits, with a power of ten where it is small. */
const show = (x, digits = 3) => {
  if (!x || Math.abs(x) >= 1e-3) return String(+x.toPrecision(digits)).replace("-", "−");
  const [mantissa, power] = x.toExponential(digits - 1).split("e");
  return (+mantissa === 1 ? raised(+power) : `${+mantissa}·${raised(+power)}`).replace("-", "−");
};
/* Of a method that is drawn in black, on dark paper too. */
const own = colour => colour === "#000000" ? "var(--ink)" : colour;
/* The value of a slider, beside it and for those who do not see it. */
const tell = (input, words) => {
  input.nextElementSibling.value = words;
  input.setAttribute("aria-valuetext", words);
};
