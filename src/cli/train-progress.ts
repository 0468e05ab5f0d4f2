/** Progress of a training run on the standard error stream: a line that is written over on a terminal, else now and then one. */
import { Presets, SingleBar } from 'cli-progress';
import type { StepEvent, TrainEvent } from '../training/log.ts';
import {
  formatCount,
  formatShort,
  formatSpeed,
  formatValue,
  smoother,
  smoothingWindow,
} from '../training/report-numbers.ts';
import type { Output } from './context.ts';
import { formatSeconds, type ProgressOptions } from './progress.ts';

export interface TrainProgress {
  /** Shows what happens; to be told everything that the log is told. */
  event(event: TrainEvent): void;
  /** A line of text, which does not disturb the one that is written over. */
  say(text: string): void;
  /** Takes the line away. */
  stop(): void;
}

/** Milliseconds between two lines where there is no terminal. */
const LINE_INTERVAL = 30_000;
/** Steps over which the speed is averaged. */
const SPEED_WINDOW = 10;
/** What the bar leaves free of a terminal's width for the words beside it. */
const WORDS_WIDTH = 72;
const MAX_BAR_WIDTH = 24;
const USUAL_COLUMNS = 80;

interface Stage {
  readonly stage: number;
  /** Such as `base 2/3`. */
  readonly title: string;
  readonly steps: number;
  readonly smooth: (loss: number) => number;
  readonly smoothSeconds: (seconds: number) => number;
  /** The first step that this process has taken: it also compiles, so that the time left is told from later ones. */
  first?: { readonly step: number; readonly time: number };
}

/** What is shown of a step. */
interface Shown {
  readonly step: number;
  readonly steps: number;
  readonly title: string;
  readonly loss: string;
  readonly rate: string;
  readonly speed: string;
  /** Empty while it cannot be told. */
  readonly left: string;
}

export function createTrainProgress(
  output: Output,
  { quiet = false, now = () => performance.now() }: ProgressOptions = {},
): TrainProgress {
  let stages: readonly { readonly name: string; readonly steps: number }[] = [];
  let current: Stage | undefined;
  let shown: Shown | undefined;
  let lastLine = now();
  const words = '{title} {bar} {value}/{total}  loss {loss}  lr {rate}  {speed} s/step  {left}';
  const barsize = Math.max(0, Math.min(MAX_BAR_WIDTH, (output.columns ?? USUAL_COLUMNS) - WORDS_WIDTH));
  const format = barsize > 0 ? words : words.replace('{bar} ', '');
  // A second Ctrl-C ends the process at once: the cursor and line wrapping stay as they are.
  const settings = { format, stream: output, barsize, clearOnComplete: true, linewrap: true, gracefulExit: false };
  const bar = new SingleBar(settings, Presets.shades_classic);
  const hide = () => {
    if (bar.isActive) bar.stop();
  };
  const draw = () => {
    if (!shown) return;
    if (bar.isActive) bar.update(shown.step, shown);
    else bar.start(shown.steps, shown.step, shown);
  };
  const say = (text: string) => {
    hide();
    output.write(`${text}\n`);
    if (output.isTTY && !quiet) draw();
  };

  const stageOf = (index: number): Stage => {
    if (current?.stage === index) return current;
    hide();
    const { name = `stage ${index + 1}`, steps = 0 } = stages[index] ?? {};
    const title = stages.length > 1 ? `${name} ${index + 1}/${stages.length}` : name;
    const smoothers = { smooth: smoother(smoothingWindow(steps)), smoothSeconds: smoother(SPEED_WINDOW) };
    current = { stage: index, title, steps, ...smoothers };
    return current;
  };
  const showStep = (event: StepEvent) => {
    const stage = stageOf(event.stage);
    const time = now();
    stage.first ??= { step: event.step, time };
    const { first, title, steps } = stage;
    const taken = event.step - first.step;
    const left = taken > 0 ? (((time - first.time) / taken) * Math.max(0, steps - event.step)) / 1000 : undefined;
    // The first step also compiles.
    const seconds = taken > 0 ? stage.smoothSeconds(event.seconds) : event.seconds;
    shown = {
      step: event.step,
      steps: Math.max(steps, event.step),
      title,
      loss: formatValue(stage.smooth(event.loss)),
      rate: formatShort(event.learningRate),
      speed: formatSpeed(seconds),
      left: left === undefined ? '' : `${formatSeconds(left)} left`,
    };
    if (output.isTTY) return draw();
    if (time - lastLine < LINE_INTERVAL && event.step !== steps) return;
    lastLine = time;
    const { loss, rate, speed } = shown;
    const of = `${formatCount(event.step)} of ${formatCount(shown.steps)} steps`;
    say(`${title}: ${of}, loss ${loss}, lr ${rate}, ${speed} s/step${shown.left && `, ${shown.left}`}`);
  };

  return {
    event(event) {
      if (event.type === 'note') say(event.message);
      if (event.type === 'end') {
        hide();
        shown = undefined;
      }
      if (event.type === 'start') stages = event.stages;
      if (quiet) return;
      if (event.type === 'step') showStep(event);
      if (event.type === 'validation') {
        const { title } = stageOf(event.stage);
        say(`${title}: validation loss ${formatValue(event.mean)} after ${formatCount(event.step)} steps`);
      }
      if (event.type === 'samples') {
        const { title } = stageOf(event.stage);
        const { length } = event.pictures;
        say(`${title}: ${length} sample picture${length === 1 ? '' : 's'} after ${formatCount(event.step)} steps`);
      }
    },
    say,
    stop() {
      hide();
      shown = undefined;
    },
  };
}
