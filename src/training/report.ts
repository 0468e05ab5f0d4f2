/**
 * The report of a training run: one HTML file that needs nothing else, neither network nor server, and renews itself
 * while the run goes on.
 */

import type { NoteEvent, RunPosition, SamplePicture, SamplesEvent, StepEvent, TrainEvent } from './log.ts';
import { type Chart, chartHtml, type Series, type Track, type View } from './report-chart.ts';
import { type Html, html, raw } from './report-html.ts';
import {
  formatCount,
  formatDuration,
  formatShort,
  formatSpeed,
  formatValue,
  smoother,
  smoothingWindow,
} from './report-numbers.ts';
import { pageHtml } from './report-page.ts';

export interface ReportOptions {
  /** The data URL of a picture by its `file` in the log; undefined when there is none. */
  readonly pictures: (file: string) => string | undefined;
  /** Whether the run goes on: the page then renews itself. */
  readonly running: boolean;
  /** Heading (default the name of the run). */
  readonly title?: string | undefined;
  /** Seconds after which the page renews itself (default 20). */
  readonly everySeconds?: number;
  /** When the report is made (default now). */
  readonly now?: Date;
}

/** A report of a run from its log. */
export function reportHtml(events: readonly TrainEvent[], options: ReportOptions): string {
  const { pictures, running, everySeconds = 20, now = new Date() } = options;
  const run = summarize(events, running);
  const title = options.title ?? run.name;
  const views = viewsOf(run);
  const shownCharts = charts(run).map((chart) => chartHtml(chart, views));
  const body = html`${header(title, run, now)}
<main>
${overview(run)}
${stageList(run)}
<section aria-labelledby="curves"><div class="bar"><h2 id="curves">Curves</h2>${controls(views)}</div>
<div class="charts">${shownCharts}</div></section>
${sampleSection(events, run, pictures)}
${noteSection(run.notes, run)}
${checkpointSection(events, run)}
${dataSection(run.data)}
${settingsSection(run.settings)}
</main>`;
  const share = run.planned > 0 ? Math.floor((100 * run.done) / run.planned) : 0;
  return pageHtml({
    title: run.state === 'running' ? `${share} % · ${title}` : `${title} · ${stateNames[run.state]}`,
    body,
    ...(running && { everySeconds, quietSeconds: quietSeconds(run, everySeconds) }),
  });
}

/** Least time without news after which the page says that there is none. */
const QUIET_SECONDS = 600;

/** The page cannot see that the process was killed, only that it has been silent for longer than usual. */
function quietSeconds({ secondsPerStep }: Run, everySeconds: number): number {
  return Math.max(QUIET_SECONDS, 10 * everySeconds, 5 * (secondsPerStep || 0));
}

type State = 'running' | 'finished' | 'stopped' | 'failed' | 'interrupted';

const stateNames: Readonly<Record<State, string>> = {
  running: 'Running',
  finished: 'Finished',
  stopped: 'Stopped',
  failed: 'Failed',
  interrupted: 'Interrupted',
};

interface Run {
  readonly name: string;
  readonly state: State;
  readonly message: string | undefined;
  readonly started: string | undefined;
  readonly updated: string | undefined;
  readonly stages: readonly StageRun[];
  /** Index in `stages` of the one that steps were last taken in. */
  readonly current: number;
  /** Steps taken and to take, of all stages. */
  readonly done: number;
  readonly planned: number;
  readonly last: StepEvent | undefined;
  /** Of the current stage, of late. */
  readonly secondsPerStep: number;
  readonly validations: readonly Extract<TrainEvent, { type: 'validation' }>[];
  readonly notes: readonly NoteEvent[];
  readonly settings: Readonly<Record<string, unknown>>;
  readonly data: string | undefined;
}

interface StageRun {
  /** Index in the run. */
  readonly stage: number;
  readonly name: string;
  readonly planned: number;
  readonly steps: readonly StepEvent[];
  /** The last step, or 0. */
  readonly reached: number;
  /** With what lies between steps, such as sample pictures. */
  readonly seconds: number;
  /** Such seconds for each step of the process that works on it, or worked last. */
  readonly pace: number;
  /** Whether a later stage has begun, or the run is finished. */
  readonly isOver: boolean;
}

/** Steps whose time is the present speed. */
const SPEED_STEPS = 50;

function summarize(events: readonly TrainEvent[], running: boolean): Run {
  const start = events.findLast((event) => event.type === 'start');
  const end = events.at(-1)?.type === 'end' ? events.at(-1) : undefined;
  const ended = end?.type === 'end' ? end : undefined;
  const state: State = running ? 'running' : (ended?.reason ?? 'interrupted');

  const clocks = new Map<number, StageClock>();
  const clockOf = (stage: number): StageClock => {
    const known = clocks.get(stage) ?? { steps: [], seconds: 0, sinceStart: 0, timed: 0 };
    clocks.set(stage, known);
    return known;
  };
  let previous = Number.NaN;
  let updated: string | undefined;
  let furthest = -1;
  for (const event of events) {
    if ('time' in event) updated = event.time;
    if (event.type !== 'start') furthest = Math.max(furthest, event.stage);
    if (event.type === 'start') {
      previous = Number.NaN;
      for (const clock of clocks.values()) clock.sinceStart = clock.timed = 0;
    }
    if (event.type !== 'step') continue;
    const clock = clockOf(event.stage);
    const time = Date.parse(event.time);
    const between = (time - previous) / 1000;
    if (clock.steps.length > 0 && between >= 0) {
      clock.sinceStart += between;
      clock.timed++;
    }
    clock.seconds += clock.steps.length > 0 && between >= 0 ? between : event.seconds || 0;
    clock.steps.push(event);
    previous = time;
  }
  const declared = start?.stages ?? [];
  const indices = [...new Set([...declared.keys(), ...clocks.keys()])].sort((a, b) => a - b);
  const stages = indices.map((stage): StageRun => {
    const { steps, seconds, sinceStart, timed } = clocks.get(stage) ?? {
      steps: [],
      seconds: 0,
      sinceStart: 0,
      timed: 0,
    };
    const reached = steps.at(-1)?.step ?? 0;
    const pace = timed > 0 ? sinceStart / timed : meanSeconds(steps);
    const { name = `Stage ${stage + 1}`, steps: planned = reached } = declared[stage] ?? {};
    const isOver = state === 'finished' || stage < furthest;
    return { stage, name, planned, steps, reached, seconds, pace, isOver };
  });
  const current = stages.findLastIndex(({ steps }) => steps.length > 0);
  const latest = stages[current]?.steps ?? [];
  return {
    name: start?.name ?? 'Training',
    state,
    message: running ? undefined : ended?.message,
    started: events.find((event) => event.type === 'start')?.time,
    updated,
    stages,
    current,
    done: stages.reduce((sum, { reached }) => sum + reached, 0),
    planned: stages.reduce((sum, { planned }) => sum + planned, 0),
    last: latest.at(-1),
    secondsPerStep: meanSeconds(latest),
    validations: events.filter((event) => event.type === 'validation'),
    notes: events.filter((event) => event.type === 'note'),
    settings: start?.settings ?? {},
    data: start?.data,
  };
}

interface StageClock {
  readonly steps: StepEvent[];
  seconds: number;
  /** Seconds, and steps they were taken for, since the process began. */
  sinceStart: number;
  timed: number;
}

function meanSeconds(steps: readonly StepEvent[]): number {
  const recent = steps.slice(-SPEED_STEPS);
  return recent.reduce((sum, { seconds }) => sum + seconds, 0) / recent.length;
}

function header(title: string, run: Run, now: Date): Html {
  const { state, message, started, updated } = run;
  const facts = [
    started !== undefined && html`<span>Started ${time(started)}</span>`,
    updated !== undefined &&
      html`<span>${state === 'running' ? html`Last news <time data-ago datetime="${updated}">${updated}</time>` : html`Ended ${time(updated)}`}</span>`,
  ];
  return html`<header><div class="top"><h1>${title}</h1><span class="state ${state}" id="state" role="status">${stateNames[state]}</span></div>
<p class="facts">${facts}${state === 'running' && html`<label class="live"><input type="checkbox" id="live" checked><span>Live</span></label>`}</p>
${message !== undefined && html`<p class="message ${state}" role="alert">${message}</p>`}
<noscript><p class="facts">Made ${time(now.toISOString())}. Reload the page for news.</p></noscript></header>`;
}

/** The page's script writes it as is usual where it is read. */
function time(iso: string): Html {
  return html`<time datetime="${iso}">${iso.slice(0, 16).replace('T', ' ')}</time>`;
}

function overview(run: Run): Html {
  const { last, stages, current, state, validations, secondsPerStep } = run;
  const stage = stages[current];
  const validation = validations.at(-1);
  const loss = stage ? smoothedLast(stage) : Number.NaN;
  const later = stages.slice(current + 1).filter(({ planned }) => planned > 0).length;
  const left = stage ? (stage.planned - stage.reached) * stage.pace : Number.NaN;
  const total = stages.reduce((sum, { seconds }) => sum + seconds, 0);
  const trend = stage ? trendOf(stage) : undefined;
  const tiles = [
    tile('Loss', formatValue(loss), trend ?? 'smoothed'),
    validation && tile('Validation', formatValue(validation.mean), `at step ${formatCount(validation.step)}`),
    tile(
      'Learning rate',
      formatShort(last?.learningRate ?? Number.NaN),
      `norm ${formatValue(last?.norm ?? Number.NaN)}`,
    ),
    tile('Speed', html`${formatSpeed(secondsPerStep)}<small> s/step</small>`, sizeAndEpoch(last)),
    state === 'running'
      ? tile(
          'Time left',
          formatDuration(left),
          later > 0
            ? `then ${later} more stage${later > 1 ? 's' : ''}`
            : `of ${formatDuration(left + (stage?.seconds ?? 0))}`,
        )
      : tile('Time', formatDuration(total), `${formatCount(run.done)} steps`),
  ];
  return html`<section class="tiles" aria-label="Where the run is">${tiles}</section>`;
}

function tile(name: string, value: string | Html, about: string): Html {
  return html`<div class="card tile"><h2>${name}</h2><p class="value">${value}</p><p class="about">${about}</p></div>`;
}

function sizeAndEpoch(last: StepEvent | undefined): string {
  const parts: string[] = [];
  if (last?.size) parts.push(`${last.size[0]} × ${last.size[1]}`);
  if (last?.epoch !== undefined) parts.push(`epoch ${formatShort(Math.floor(last.epoch))}`);
  return parts.join(' · ');
}

/** How the smoothed loss has changed over the last tenth of the steps. */
function trendOf(stage: StageRun): string | undefined {
  const smoothed = smooth(stage, ({ loss }) => loss);
  const back = Math.floor(smoothed.length / 10);
  if (back < 10) return undefined;
  const before = smoothed[smoothed.length - 1 - back]!;
  const change = (100 * (smoothed.at(-1)! - before)) / Math.abs(before);
  if (!Number.isFinite(change)) return undefined;
  const sign = change > 0 ? '+' : change < 0 ? '−' : '±';
  return `${sign}${Math.abs(change).toFixed(1)} % in ${formatCount(back)} steps`;
}

function smoothedLast(stage: StageRun): number {
  return smooth(stage, ({ loss }) => loss).at(-1) ?? Number.NaN;
}

function smooth({ steps, planned }: StageRun, value: (step: StepEvent) => number): number[] {
  const next = smoother(smoothingWindow(planned));
  return steps.map((step) => next(value(step)));
}

function stageList(run: Run): Html {
  const { stages, state, current } = run;
  const rows = stages.map((stage, i) => {
    const { name, planned, reached, seconds, pace, isOver } = stage;
    const share = isOver ? 100 : planned > 0 ? Math.min(100, (100 * reached) / planned) : 0;
    const isCurrent = i === current && !isOver;
    const isComplete = isOver || (planned > 0 && reached >= planned);
    const left = isComplete
      ? reached > 0
        ? `took ${formatDuration(seconds)}`
        : 'done'
      : state !== 'running'
        ? reached > 0
          ? 'not finished'
          : 'not begun'
        : reached > 0
          ? `${formatDuration((planned - reached) * pace)} left`
          : 'to come';
    const label = `${name}: ${formatCount(reached)} of ${formatCount(planned)} steps`;
    return html`<li class="${isCurrent ? 'current' : isComplete ? 'done' : 'waiting'}"><b>${name}</b>
<span class="track" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="${Math.floor(share)}" aria-label="${label}"><i style="width:${share.toFixed(2)}%"></i></span>
<span class="steps">${planned > 0 && html`${formatCount(reached)}<small> / ${formatCount(planned)}</small>`}</span><span class="left">${left}</span></li>`;
  });
  return html`<section class="card" aria-labelledby="stages"><h2 id="stages">Stages</h2><ol class="stages">${rows}</ol></section>`;
}

/** Stages that can be looked at by themselves. */
const MAX_STAGE_VIEWS = 8;

/** The whole run, and the last of its stages. Each begins where the one before it has ended so far. */
function viewsOf({ stages }: Run): View[] {
  const begun = stages.filter(({ steps }) => steps.length > 0);
  let offset = 0;
  const all = begun.map(({ stage, name, reached }) => {
    const placed = { stage, name, offset, steps: reached };
    offset += reached;
    return placed;
  });
  const views: View[] = [{ id: 'all', title: 'All stages', stages: all }];
  if (all.length < 2) return views;
  for (const placed of all.slice(-MAX_STAGE_VIEWS)) {
    views.push({ id: `stage-${placed.stage}`, title: placed.name, stages: [{ ...placed, offset: 0 }] });
  }
  return views;
}

function controls(views: readonly View[]): Html {
  const choice = (view: View, i: number) =>
    html`<label><input type="radio" name="view" value="${view.id}"${raw(i === 0 ? ' checked' : '')}><span>${view.title}</span></label>`;
  return html`<form class="controls" autocomplete="off">${
    views.length > 1 && html`<fieldset><legend>Stage</legend>${views.map(choice)}</fieldset>`
  }<label class="switch"><input type="checkbox" id="log"><span>Log scale</span></label></form>`;
}

/** Metrics of steps that have a chart, by their names. */
const MAX_METRICS = 12;

function charts(run: Run): Chart[] {
  const common = { logarithmic: true, fromZero: false, cutsPeaks: false };
  const list: Chart[] = [
    { ...common, id: 'loss', title: 'Loss', series: [stepSeries(run, 'Loss', ({ loss }) => loss, true)] },
  ];
  const validation = validationSeries(run);
  if (validation.length > 0) {
    const about = 'On pictures held out, by noise level σ.';
    list.push({ ...common, id: 'validation', title: 'Validation loss', about, series: validation });
  }
  list.push(
    {
      ...common,
      id: 'norm',
      title: 'Gradient norm',
      series: [stepSeries(run, 'Norm', ({ norm }) => norm, true)],
      cutsPeaks: true,
    },
    {
      ...common,
      id: 'rate',
      title: 'Learning rate',
      series: [stepSeries(run, 'Learning rate', ({ learningRate }) => learningRate, false)],
      logarithmic: false,
      fromZero: true,
    },
    {
      ...common,
      id: 'seconds',
      title: 'Seconds per step',
      series: [stepSeries(run, 'Seconds', ({ seconds }) => seconds, false)],
      logarithmic: false,
      fromZero: true,
      cutsPeaks: true,
    },
  );
  const names = new Set<string>();
  for (const { steps } of run.stages) {
    // The steps of a stage have the same metrics.
    for (const step of [steps[0], steps.at(-1)]) for (const name of Object.keys(step?.metrics ?? {})) names.add(name);
  }
  for (const [i, name] of [...names].slice(0, MAX_METRICS).entries()) {
    const series = [stepSeries(run, name, ({ metrics }) => metrics?.[name] ?? Number.NaN, true)];
    list.push({ ...common, id: `metric-${i}`, title: name, series });
  }
  return list;
}

function stepSeries(run: Run, name: string, value: (step: StepEvent) => number, smoothed: boolean): Series {
  const tracks = run.stages.map((stage): Track => {
    const steps = stage.steps.map(({ step }) => step);
    const values = stage.steps.map(value);
    return { stage: stage.stage, steps, values, smoothed: smoothed ? smooth(stage, value) : undefined };
  });
  return { name, tracks, strength: 1 };
}

/** Noise levels of which validation losses are drawn. */
const MAX_SIGMAS = 12;
const FAINTEST = 0.25;

/** The mean, and fainter the noise levels: the lower, the fainter. */
function validationSeries({ validations }: Run): Series[] {
  if (validations.length === 0) return [];
  const sigmas = [...new Set(validations.flatMap(({ losses }) => losses.map(({ sigma }) => sigma)))]
    .sort((a, b) => b - a)
    .slice(0, MAX_SIGMAS);
  const trackBy = (value: (event: (typeof validations)[number]) => number): Track[] => {
    const stages = [...new Set(validations.map(({ stage }) => stage))];
    return stages.map((stage) => {
      const own = validations.filter((event) => event.stage === stage);
      return { stage, steps: own.map(({ step }) => step), values: own.map(value) };
    });
  };
  const series: Series[] = [{ name: 'Mean', tracks: trackBy(({ mean }) => mean), strength: 1 }];
  if (sigmas.length < 2) return series;
  for (const [i, sigma] of sigmas.entries()) {
    const strength = Number((0.7 - ((0.7 - FAINTEST) * i) / (sigmas.length - 1)).toFixed(2));
    const tracks = trackBy(({ losses }) => losses.find((loss) => loss.sigma === sigma)?.loss ?? Number.NaN);
    series.push({ name: `σ ${formatShort(sigma)}`, tracks, strength });
  }
  return series;
}

/** Rounds of samples and prompts that are shown. */
const MAX_ROUNDS = 16;
const MAX_PROMPTS = 16;

interface Grid {
  readonly rounds: readonly SamplesEvent[];
  readonly rows: readonly {
    readonly prompt: string;
    readonly seed: number;
    readonly cells: readonly (SamplePicture | undefined)[];
  }[];
}

/**
 * The rounds of samples that are shown, and their pictures by prompt. Where there are too many rounds, only every
 * second, fourth, ... one is, so that a round stays or goes for good, and the last.
 */
function gridOf(events: readonly TrainEvent[]): Grid {
  const byPosition = new Map<string, SamplesEvent>();
  for (const event of events) if (event.type === 'samples') byPosition.set(`${event.stage} ${event.step}`, event);
  const all = [...byPosition.values()];
  let every = 1;
  while (all.length / every > MAX_ROUNDS - 1) every *= 2;
  const rounds = all.filter((_, i) => i % every === 0 || i === all.length - 1);
  const rows = new Map<string, { prompt: string; seed: number; cells: (SamplePicture | undefined)[] }>();
  for (const [column, { pictures }] of rounds.entries()) {
    const seen = new Map<string, number>();
    for (const picture of pictures) {
      const { prompt, seed } = picture;
      const same = JSON.stringify([prompt, seed]);
      const nth = (seen.get(same) ?? 0) + 1;
      seen.set(same, nth);
      const key = `${nth} ${same}`;
      const row = rows.get(key) ?? { prompt, seed, cells: rounds.map(() => undefined) };
      row.cells[column] = picture;
      rows.set(key, row);
    }
  }
  // The latest prompts, where they were changed on the way.
  const shown = [...rows.values()].filter(({ cells }) => cells.at(-1));
  const others = [...rows.values()].filter(({ cells }) => !cells.at(-1));
  return { rounds, rows: [...shown, ...others].slice(0, MAX_PROMPTS) };
}

/** Files of the sample pictures that a report shows. */
export function shownPictures(events: readonly TrainEvent[]): string[] {
  const files = gridOf(events).rows.flatMap(({ cells }) => cells.flatMap((cell) => cell?.file ?? []));
  return [...new Set(files)];
}

function sampleSection(events: readonly TrainEvent[], run: Run, pictures: ReportOptions['pictures']): Html | undefined {
  const { rounds, rows } = gridOf(events);
  if (rows.length === 0) return undefined;
  const head = rounds.map(
    (round) => html`<th scope="col">${stageName(run, round)}<br><b>${formatCount(round.step)}</b></th>`,
  );
  const body = rows.map(({ prompt, seed, cells }) => {
    const shots = cells.map((cell, column) => {
      const round = rounds[column]!;
      return html`<td>${cell && shot(cell, round, run, pictures)}</td>`;
    });
    const title = html`<span class="prompt">${prompt === '' ? '(empty prompt)' : prompt}<small> seed ${seed}</small></span>`;
    return html`<tbody><tr><th colspan="${rounds.length}" scope="rowgroup">${title}</th></tr><tr class="shots">${shots}</tr></tbody>`;
  });
  return html`<section class="card" aria-labelledby="samples"><h2 id="samples">Samples</h2>
<div class="scroll" id="sample-scroll" tabindex="0" role="region" aria-labelledby="samples"><table class="samples"><thead><tr>${head}</tr></thead>${body}</table></div></section>
<dialog id="viewer" aria-label="Sample picture"><button type="button" class="close" id="viewer-close" aria-label="Close">×</button><img alt="" id="viewer-picture"><p id="viewer-text"></p><p class="keys"><a id="viewer-file" target="_blank" rel="noreferrer">Open the file</a><span>← → steps</span><span>↑ ↓ prompts</span></p></dialog>`;
}

function shot(picture: SamplePicture, round: RunPosition, run: Run, pictures: ReportOptions['pictures']): Html {
  const { prompt, file, width, height } = picture;
  const url = pictures(file);
  if (url === undefined) return html`<span class="gone" title="${file}">picture missing</span>`;
  const place = `${stageName(run, round)}, step ${formatCount(round.step)}`;
  // The address of a file of the run's folder, whatever it is called.
  const address = `./${file.replaceAll('\\', '/').split('/').map(encodeURIComponent).join('/')}`;
  return html`<button type="button" data-place="${place}" data-file="${address}" aria-label="Enlarge: ${prompt}, ${place}"><img src="${url}" alt="${prompt}" width="${width}" height="${height}"></button>`;
}

function stageName({ stages }: Run, { stage }: RunPosition): string {
  return stages.find((known) => known.stage === stage)?.name ?? `Stage ${stage + 1}`;
}

const MAX_NOTES = 200;

function noteSection(notes: readonly NoteEvent[], run: Run): Html | undefined {
  if (notes.length === 0) return undefined;
  const shown = notes.slice(-MAX_NOTES).reverse();
  const items = shown.map(
    (note) =>
      html`<li><p>${stageName(run, note)} · step ${formatCount(note.step)} · ${time(note.time)}</p><pre>${note.message}</pre></li>`,
  );
  const more =
    notes.length > shown.length && html`<p class="about">and ${formatCount(notes.length - shown.length)} earlier</p>`;
  return html`<section class="card" aria-labelledby="notes"><h2 id="notes">Notes <small>${formatCount(notes.length)}</small></h2><ul class="notes">${items}</ul>${more}</section>`;
}

const MAX_CHECKPOINTS = 100;

function checkpointSection(events: readonly TrainEvent[], run: Run): Html | undefined {
  const all = events.filter((event) => event.type === 'checkpoint');
  if (all.length === 0) return undefined;
  const shown = all.slice(-MAX_CHECKPOINTS).reverse();
  const rows = shown.map(
    (checkpoint) =>
      html`<tr><td>${stageName(run, checkpoint)}</td><td class="number">${formatCount(checkpoint.step)}</td><td><code>${checkpoint.file}</code></td></tr>`,
  );
  const more =
    all.length > shown.length && html`<p class="about">and ${formatCount(all.length - shown.length)} earlier</p>`;
  return html`<section class="card"><details id="checkpoints"><summary><h2>Checkpoints <small>${formatCount(all.length)} written; older ones are removed as the settings say</small></h2></summary>
<div class="scroll"><table class="list"><thead><tr><th scope="col">Stage</th><th scope="col" class="number">Step</th><th scope="col">File</th></tr></thead><tbody>${rows}</tbody></table></div>${more}</details></section>`;
}

function dataSection(data: string | undefined): Html | undefined {
  if (data === undefined || data === '') return undefined;
  return html`<section class="card"><details id="data" open><summary><h2>Data</h2></summary><pre class="scroll">${data}</pre></details></section>`;
}

const MAX_SETTINGS = 1000;
const MAX_DEPTH = 8;

interface Setting {
  readonly name: string;
  readonly value: string;
}

function settingsSection(settings: Readonly<Record<string, unknown>>): Html | undefined {
  const general: Setting[] = [];
  const groups: { title: string; list: Setting[] }[] = [];
  for (const [name, value] of Object.entries(settings)) {
    if (!isObject(value)) general.push({ name, value: plain(value) });
    else if (Array.isArray(value) ? value.some(isObject) : Object.values(value).every(isObject)) {
      // A list of stages, a record of data sets: a group for each.
      for (const [key, entry] of Object.entries(value)) {
        const label = isObject(entry) && 'name' in entry && typeof entry.name === 'string' ? entry.name : key;
        groups.push({ title: `${name} · ${label}`, list: flatten('', entry) });
      }
    } else groups.push({ title: name, list: flatten('', value) });
  }
  const all = [{ title: 'General', list: general }, ...groups].filter(({ list }) => list.length > 0);
  if (all.length === 0) return undefined;
  let left = MAX_SETTINGS;
  const tables = all.map(({ title, list }) => {
    const shown = list.slice(0, left);
    left -= shown.length;
    const rows = shown.map(({ name, value }) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`);
    return shown.length > 0 && html`<div class="group"><h3>${title}</h3><dl>${rows}</dl></div>`;
  });
  return html`<section class="card"><details id="settings"><summary><h2>Settings</h2></summary><div class="settings">${tables}</div></details></section>`;
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null;
}

/** Settings inside a value, by their paths. A list of plain values is one setting. */
function flatten(path: string, value: unknown, depth = 0): Setting[] {
  if (!isObject(value)) return [{ name: path, value: plain(value) }];
  if (depth >= MAX_DEPTH) return [{ name: path, value: '…' }];
  const entries = Object.entries(value).slice(0, MAX_SETTINGS);
  if (Array.isArray(value) && !value.some(isObject)) {
    return [{ name: path, value: entries.map(([, item]) => plain(item)).join(', ') || '–' }];
  }
  return entries.flatMap(([name, inner]) => flatten(path ? `${path}.${name}` : name, inner, depth + 1));
}

function plain(value: unknown): string {
  if (value === undefined || value === null || value === '') return '–';
  if (typeof value === 'boolean') return value ? 'yes' : 'no';
  return typeof value === 'number' ? formatShort(value) : String(value);
}
