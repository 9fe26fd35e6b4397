// Numbers and states as people read them.

const whole = new Intl.NumberFormat("en");

/** 1536 → "1,536". */
export const count = (number) => whole.format(number);

/** "1 node", "2 nodes". */
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Bytes with three digits; a GB is 2^30 bytes, as memory is sold. */
export function bytes(number) {
  const units = ["bytes", "KB", "MB", "GB", "TB"];
  let value = number;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${Number(value.toFixed(digits))} ${units[unit]}`;
}

/** Milliseconds as "85 ms" or "1.24 s". */
export const duration = (ms) =>
  ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;

/** 0.456 → "45%": never 100% before the end. */
export const percent = (fraction) => `${Math.floor(fraction * 100)}%`;

/** A half-open range of layers: [0, 6] → "0–5". */
export const range = ([first, end]) => (end - first === 1 ? `${first}` : `${first}–${end - 1}`);

/** The same with its noun: "layers 0–5". */
export const layers = (ends) => `${ends[1] - ends[0] === 1 ? "layer" : "layers"} ${range(ends)}`;
