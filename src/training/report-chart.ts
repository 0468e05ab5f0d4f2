/** Charts of a training run as HTML and SVG, drawn beforehand for every stage and scale that can be chosen. */

import { type Html, html, jsonScript, raw } from './report-html.ts';
import { formatCount, formatMarks, formatValue, logTicks, ticks } from './report-numbers.ts';

/** The values of one stage, by their steps. */
export interface Track {
  readonly stage: number;
  readonly steps: readonly number[];
  readonly values: readonly number[];
  /** What the line shows (default the mean of the values in a column). */
  readonly smoothed?: readonly number[] | undefined;
}

export interface Series {
  /** Names the series where there are several. */
  readonly name: string;
  readonly tracks: readonly Track[];
  /** From 0, faint, to 1. */
  readonly strength: number;
}

export interface Chart {
  readonly id: string;
  readonly title: string;
  readonly about?: string;
  readonly series: readonly Series[];
  /** Whether it can be shown on a logarithmic scale. */
  readonly logarithmic: boolean;
  /** Whether the linear scale begins at 0. */
  readonly fromZero: boolean;
  /** Whether the scale is chosen without the largest of the values, such as the first step that compiles. */
  readonly cutsPeaks: boolean;
}

/** A part of the run that a chart can show. */
export interface View {
  readonly id: string;
  readonly title: string;
  readonly stages: readonly ViewStage[];
}

export interface ViewStage {
  readonly stage: number;
  readonly name: string;
  /** Steps of the view before the stage. */
  readonly offset: number;
  readonly steps: number;
}

/** Columns to which the steps of a chart are gathered: about as many as it has pixels on a phone. */
const COLUMNS = 320;
/** Side of the square that the drawing coordinates span. */
const SPAN = 1000;
/** Points so few that each is marked. */
const MARKED_POINTS = 40;
/** Shares of the values that lie below and above what a chart shows. */
const CUT = 0.01;

export function chartHtml(chart: Chart, views: readonly View[]): Html {
  const plots = views.map((view, i) => plotsHtml(chart, view, i === 0));
  return html`<figure class="card chart" id="chart-${chart.id}">
<figcaption><h3>${chart.title}</h3>${chart.about && html`<p>${chart.about}</p>`}${legend(chart)}</figcaption>
${plots}</figure>
`;
}

function legend({ series }: Chart): Html | undefined {
  if (series.length < 2) return undefined;
  const entries = series.map(({ name, strength }) => html`<li><i style="opacity:${strength}"></i>${name}</li>`);
  return html`<ul class="legend">${entries}</ul>`;
}

/** Steps that one horizontal position stands for. */
export interface Column {
  readonly stage: number;
  readonly first: number;
  readonly last: number;
  /** Steps of the view before its middle. */
  readonly at: number;
  readonly min: number;
  readonly max: number;
  readonly mean: number;
  /** Where the line goes through. */
  readonly line: number;
}

/**
 * Gathers steps to columns of equal width, in the order of the steps; stages share none. Values that are not finite are
 * left out.
 */
export function columnsOf(tracks: readonly Track[], { stages }: Pick<View, 'stages'>, count = COLUMNS): Column[] {
  const total = stages.reduce((end, { offset, steps }) => Math.max(end, offset + steps), 0);
  const columns: Column[] = [];
  for (const { stage, steps, values, smoothed } of tracks) {
    const shown = stages.find((candidate) => candidate.stage === stage);
    if (!shown) continue;
    let open:
      | { index: number; first: number; last: number; min: number; max: number; sum: number; n: number }
      | undefined;
    let line = Number.NaN;
    const close = () => {
      if (!open) return;
      const { first, last, min, max, sum, n } = open;
      const mean = sum / n;
      const at = shown.offset + (first + last) / 2;
      columns.push({ stage, first, last, at, min, max, mean, line: smoothed ? line : mean });
    };
    for (let i = 0; i < values.length; i++) {
      const value = values[i]!;
      if (!Number.isFinite(value)) continue;
      const step = steps[i]!;
      const index = Math.min(count - 1, Math.floor(((shown.offset + step) / total) * count));
      if (open && open.index === index) {
        open.last = step;
        open.min = Math.min(open.min, value);
        open.max = Math.max(open.max, value);
        open.sum += value;
        open.n++;
      } else {
        close();
        open = { index, first: step, last: step, min: value, max: value, sum: value, n: 1 };
      }
      line = smoothed?.[i] ?? value;
    }
    close();
  }
  return columns;
}

/** From a value to its place, 0 below and 1 above; undefined for what the scale does not have. */
interface Scale {
  readonly low: number;
  readonly high: number;
  readonly marks: readonly number[];
  place(value: number): number | undefined;
}

interface Drawn {
  readonly series: Series;
  readonly columns: readonly Column[];
}

function plotsHtml(chart: Chart, view: View, isFirst: boolean): Html {
  const drawn = chart.series.map((series) => ({ series, columns: columnsOf(series.tracks, view) }));
  const all = drawn.flatMap(({ columns }) => columns);
  if (all.length === 0) {
    return html`<p class="empty" data-view="${view.id}"${raw(isFirst ? '' : ' hidden')}>Nothing yet.</p>`;
  }
  // Whole stages, so that charts lie alike below each other.
  const begun = view.stages.filter(({ stage }) => all.some((column) => column.stage === stage));
  const left = begun[0]!.offset;
  const right = begun.at(-1)!.offset + Math.max(begun.at(-1)!.steps, 1);
  const across = (at: number) => (at - left) / (right - left);
  const linear = linearScale(all, chart);
  const logarithmic = chart.logarithmic ? logScale(all, chart) : undefined;
  const hoverId = `hover-${chart.id}-${view.id}`;
  const label = describe(chart, view, drawn);

  const plot = (scale: Scale, kind: 'linear' | 'log' | undefined) => {
    const hidden = raw(isFirst && kind !== 'log' ? '' : ' hidden');
    const texts = formatMarks(scale.marks);
    const marks = scale.marks.map((value, i) => ({ text: texts[i], up: percent(scale.place(value) ?? 0) }));
    const staged = view.stages.length > 1 ? ' staged' : '';
    return html`<div class="plot${staged}" data-view="${view.id}"${kind && html` data-scale="${kind}"`}${hidden}>
<div class="area" tabindex="0" role="group" aria-roledescription="chart" aria-label="${label}" data-hover="${hoverId}">
${marks.map(({ text, up }) => html`<span class="y" style="bottom:${up}">${text}</span>`)}
${stageMarks(view, across)}
<svg viewBox="0 0 ${SPAN} ${SPAN}" preserveAspectRatio="none" aria-hidden="true">${gridLines(scale)}${drawn.map((part) => paths(part, scale, across))}</svg>
<i class="cursor"></i><i class="dot"></i><output class="tip"></output>
</div>
<div class="x" aria-hidden="true">${stepMarks(left, right, across)}</div>
</div>
`;
  };
  return html`${logarithmic ? [plot(linear, 'linear'), plot(logarithmic, 'log')] : plot(linear, undefined)}${jsonScript(hoverId, readOut(chart, view, drawn, across, linear, logarithmic))}
`;
}

function percent(share: number): string {
  return `${Number((100 * share).toFixed(2))}%`;
}

/** The values that a scale is chosen for: in small charts all. */
function rangeOf(columns: readonly Column[], { cutsPeaks }: Chart): { low: number; high: number } {
  const sorted = (values: number[]) => values.filter(Number.isFinite).sort((a, b) => a - b);
  const lows = sorted(columns.map(({ min }) => min));
  const highs = sorted(columns.map(({ max }) => max));
  const lines = sorted(columns.map(({ line }) => line));
  const cut = Math.floor(lows.length * CUT);
  const low = Math.min(lows[cut]!, lines[0] ?? Number.POSITIVE_INFINITY);
  const high = highs[highs.length - 1 - cut]!;
  return { low, high: cutsPeaks ? high : Math.max(high, lines.at(-1) ?? high) };
}

/** Room between the outermost values and the edges, as a share of the height. */
const MARGIN = 0.06;

function linearScale(columns: readonly Column[], chart: Chart): Scale {
  let { low, high } = rangeOf(columns, chart);
  if (chart.fromZero) low = Math.min(0, low);
  // A constant lies in the middle.
  const room = high > low ? MARGIN * (high - low) : Math.abs(high) / 2 || 1;
  if (!(chart.fromZero && low === 0 && high > 0)) low -= room;
  high += room;
  return { low, high, marks: ticks(low, high, 5), place: (value) => (value - low) / (high - low) };
}

/** Undefined where no value is positive. */
function logScale(columns: readonly Column[], chart: Chart): Scale | undefined {
  const positive = columns
    .filter(({ max, line }) => max > 0 && (line > 0 || !Number.isFinite(line)))
    .map((column) => ({ ...column, min: column.min > 0 ? column.min : column.max }));
  if (positive.length === 0) return undefined;
  const { low, high } = rangeOf(positive, chart);
  const room = Math.max(MARGIN * Math.log(high / low), 0.05);
  const [bottom, top] = [Math.log(low) - room, Math.log(high) + room];
  return {
    low,
    high,
    marks: logTicks(Math.exp(bottom), Math.exp(top), 4),
    place: (value) => (value > 0 ? (Math.log(value) - bottom) / (top - bottom) : undefined),
  };
}

function gridLines(scale: Scale): Html {
  const lines = scale.marks.map((mark) => `M0 ${coordinate(1 - (scale.place(mark) ?? 0))}h${SPAN}`);
  return html`<path class="grid" d="${raw(lines.join(''))}"/>`;
}

function coordinate(share: number): number {
  return Math.round(share * SPAN * 10) / 10;
}

/** The range of the values, faint, and the line. */
function paths({ series, columns }: Drawn, scale: Scale, across: (at: number) => number): Html {
  const point = (at: number, value: number): string | undefined => {
    const up = scale.place(value);
    // Far outside is outside as well, with fewer digits.
    return up === undefined ? undefined : `${coordinate(across(at))} ${coordinate(1 - Math.min(Math.max(up, -1), 2))}`;
  };
  let range = '';
  let line = '';
  let previous: { stage: number; line: boolean; range: boolean } | undefined;
  for (const column of columns) {
    const continued = previous?.stage === column.stage;
    const low = point(column.at, column.min);
    const high = point(column.at, column.max);
    const bottom = low ?? high;
    if (bottom !== undefined && high !== undefined) {
      range += `${continued && previous?.range ? 'L' : 'M'}${bottom}`;
      if (bottom !== high) range += `L${high}`;
    }
    const middle = point(column.at, column.line);
    if (middle !== undefined) line += continued && previous?.line ? `L${middle}` : `M${middle}L${middle}`;
    previous = { stage: column.stage, line: middle !== undefined, range: bottom !== undefined };
  }
  const hasRange = series.tracks.some(({ smoothed }) => smoothed) || columns.some(({ first, last }) => first < last);
  const marks = columns.length <= MARKED_POINTS ? line.replace(/[ML]([-\d. ]+)/g, 'M$1h0') : '';
  const opacity = series.strength < 1 && raw(` opacity="${series.strength}"`);
  return html`${hasRange && html`<path class="range" d="${raw(range)}"/>`}<path class="line" d="${raw(line)}"${opacity}/>${marks && html`<path class="marks" d="${raw(marks)}"${opacity}/>`}`;
}

/** Where stages begin, with their names. */
function stageMarks({ stages }: View, across: (at: number) => number): Html | undefined {
  if (stages.length < 2) return undefined;
  const marks = stages.map(({ name, offset, steps }) => {
    const left = across(offset);
    const right = across(offset + steps);
    if (right <= 0 || left >= 1) return undefined;
    const kind = left <= 0 ? 'stage first' : 'stage';
    return html`<span class="${kind}" style="left:${percent(left)};width:${percent(right - left)}"><b>${name}</b></span>`;
  });
  return html`${marks}`;
}

function stepMarks(left: number, right: number, across: (at: number) => number): Html {
  const whole = ticks(left, right, 4).filter(Number.isInteger);
  const marks = whole.length ? whole : [Math.round(left)];
  return html`${marks.map((mark) => html`<span style="left:${percent(across(mark))}">${formatCount(mark)}</span>`)}`;
}

/** What the page's script shows: place from the left, heights on both scales (all 0 to 1000), title, names and values. */
type ReadOut = [x: number, linear: number, log: number, title: string, rows: [name: string, value: string][]];

function readOut(
  chart: Chart,
  view: View,
  drawn: readonly Drawn[],
  across: (at: number) => number,
  linear: Scale,
  logarithmic: Scale | undefined,
): ReadOut[] {
  const read = new Map<string, ReadOut>();
  const height = (value: number, scale: Scale | undefined) =>
    coordinate(Math.min(Math.max(scale?.place(value) ?? 0, 0), 1));
  for (const { series, columns } of drawn) {
    for (const column of columns) {
      const { stage, first, last, line, at } = column;
      const key = `${stage} ${last}`;
      const known = read.get(key);
      const rows = rowsOf(chart, series, column);
      if (known) {
        known[4].push(...rows);
        continue;
      }
      const steps = first === last ? `step ${formatCount(last)}` : `steps ${formatCount(first)}–${formatCount(last)}`;
      const name = view.stages.length > 1 ? `${view.stages.find((shown) => shown.stage === stage)?.name ?? ''} · ` : '';
      const x = Math.round(across(at) * SPAN);
      read.set(key, [x, height(line, linear), height(line, logarithmic), `${name}${steps}`, rows]);
    }
  }
  return [...read.values()];
}

function rowsOf({ series: all }: Chart, series: Series, { line, mean, min, max }: Column): [string, string][] {
  if (all.length > 1) return [[series.name, formatValue(mean)]];
  const isSmoothed = series.tracks.some(({ smoothed }) => smoothed);
  const rows: [string, string][] = isSmoothed ? [['Smoothed', formatValue(line)]] : [];
  rows.push([isSmoothed ? 'Mean' : '', formatValue(mean)]);
  if (min < max) rows.push(['Range', `${formatValue(min)} – ${formatValue(max)}`]);
  return rows;
}

/** The chart in a sentence, for those who do not see it. */
function describe(chart: Chart, view: View, drawn: readonly Drawn[]): string {
  const columns = drawn[0]?.columns.length ? drawn[0].columns : drawn.flatMap((part) => part.columns);
  const values = columns.map(({ line }) => line).filter(Number.isFinite);
  const ends = `${formatValue(values[0] ?? Number.NaN)} at first, ${formatValue(values.at(-1) ?? Number.NaN)} at last`;
  const extremes = `lowest ${formatValue(Math.min(...values))}, highest ${formatValue(Math.max(...values))}`;
  const stage = view.stages.length === 1 ? ` of ${view.stages[0]!.name}` : '';
  return `${chart.title}${stage} by step: ${ends}; ${extremes}. Arrow keys read it out.`;
}
