/** Numbers for people to read: smoothing, rounding, and where an axis has its marks. */

/** Share of a stage's steps that its smoothed curves look back on. */
const SMOOTHING_SHARE = 0.02;
const SHORTEST_WINDOW = 10;

/** Steps over which the values of a stage are smoothed. */
export function smoothingWindow(steps: number): number {
  return Math.max(SHORTEST_WINDOW, Math.round(steps * SMOOTHING_SHARE));
}

/**
 * Exponential moving average with a weight of 1 / window for each new value, without the bias towards its start of 0
 * (Adam, arXiv 1412.6980, section 3). Values that are not finite are passed over.
 * @returns a function from the next value to the average so far; NaN before the first
 */
export function smoother(window: number): (value: number) => number {
  const keep = 1 - 1 / window;
  let average = 0;
  let weight = 0;
  return (value) => {
    if (Number.isFinite(value)) {
      average = keep * average + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
    }
    return weight > 0 ? average / weight : Number.NaN;
  };
}

/** Four significant digits; an exponent where there would be many zeros; a dash for what is not finite. */
export function formatValue(value: number): string {
  if (!Number.isFinite(value)) return '–';
  return isAwkward(value) ? exponential(value) : value.toPrecision(4);
}

/** As short as it can be: 0.5, 1e-4. */
export function formatShort(value: number): string {
  if (!Number.isFinite(value)) return '–';
  return isAwkward(value) ? exponential(value) : String(Number(value.toPrecision(4)));
}

/** Marks of one axis, written alike. */
export function formatMarks(values: readonly number[]): string[] {
  return values.map(values.some(isAwkward) ? (value) => (value === 0 ? '0' : exponential(value)) : formatShort);
}

function isAwkward(value: number): boolean {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e4);
}

function exponential(value: number): string {
  return value
    .toExponential(2)
    .replace(/\.?0+e/, 'e')
    .replace('e+', 'e');
}

const grouped = new Intl.NumberFormat('en-US');

/** A whole number with its thousands apart: 12,345. */
export function formatCount(value: number): string {
  return grouped.format(value);
}

const UNITS = [
  ['d', 86_400],
  ['h', 3600],
  ['min', 60],
  ['s', 1],
] as const;

/** From this many of a unit on, the next smaller one tells nothing more. */
const ENOUGH = 10;

/** In the largest unit, and the next where there are few: 3 h 12 min, 25 min, 45 s. */
export function formatDuration(seconds: number): string {
  if (!(seconds >= 0 && seconds < 1e10)) return '–';
  const whole = Math.round(seconds);
  const first = UNITS.findIndex(([, size]) => whole >= size);
  if (first < 0) return '0 s';
  const [unit, size] = UNITS[first]!;
  const next = whole < ENOUGH * size ? UNITS[first + 1] : undefined;
  const rest = next ? Math.floor((whole % size) / next[1]) : 0;
  return `${Math.floor(whole / size)} ${unit}${next && rest ? ` ${rest} ${next[0]}` : ''}`;
}

/** Seconds a step, with the digits that tell something. */
export function formatSpeed(seconds: number): string {
  if (!Number.isFinite(seconds)) return '–';
  return seconds >= 100 ? String(Math.round(seconds)) : String(Number(seconds.toPrecision(seconds >= 10 ? 3 : 2)));
}

/** Round numbers from `low` to `high`, about `count` of them. */
export function ticks(low: number, high: number, count: number): number[] {
  const rough = (high - low) / count;
  if (!(rough > 0 && Number.isFinite(rough))) return [];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * (rough / power <= 1.5 ? 1 : rough / power <= 3.5 ? 2 : rough / power <= 7.5 ? 5 : 10);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  if (!(last - first < 100)) return [];
  // Products, not sums, so that 0.3 is not 0.30000000000000004; rounded for the same reason.
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** Marks of a logarithmic axis: powers of ten, with 2 and 5 between them where few powers fit. */
export function logTicks(low: number, high: number, count: number): number[] {
  const decades = Math.log10(high / low);
  if (!(decades > 0 && decades < 600)) return [];
  const every = Math.max(1, Math.round(decades / count));
  const factors = decades < 3 ? [1, 2, 5] : [1];
  const marks: number[] = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (power % every !== 0) continue;
    for (const factor of factors) marks.push(Number(`${factor}e${power}`));
  }
  const inside = marks.filter((mark) => mark >= low * (1 - 1e-9) && mark <= high * (1 + 1e-9));
  return inside.length >= 3 ? inside : ticks(low, high, count).filter((mark) => mark > 0);
}
