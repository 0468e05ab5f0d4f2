/** Progress on the standard error stream: a bar with the time left on a terminal, now and then a line elsewhere. */
import { Presets, SingleBar } from 'cli-progress';
import type { Output } from './context.ts';

export interface Progress {
  /** A line of text, which does not disturb the bar. */
  say(text: string): void;
  /** `done` of `total` steps are done. */
  step(done: number, total: number): void;
  /** `done` of `total` bytes of a conversion are written. */
  convert(title: string, done: number, total: number): void;
  /** Takes the bar away. */
  stop(): void;
}

export interface ProgressOptions {
  /** No bar and no lines about progress; what is said is still said. */
  readonly quiet?: boolean | undefined;
  /** Milliseconds from any fixed moment; default the clock. */
  readonly now?: () => number;
}

/** Milliseconds between two lines where there is no terminal. */
const LINE_INTERVAL = 10_000;

const BAR_WIDTH = 30;

export function createProgress(
  output: Output,
  { quiet = false, now = () => performance.now() }: ProgressOptions = {},
): Progress {
  const left = timeLeft(now);
  const say = (text: string) => void output.write(`${text}\n`);
  if (quiet) return { say, step: () => undefined, convert: () => undefined, stop: () => undefined };
  if (!output.isTTY) {
    let lastLine = now();
    return {
      say,
      step(done, total) {
        const time = left(done, total);
        if (now() - lastLine < LINE_INTERVAL || done === total) return;
        lastLine = now();
        say(`${done} of ${total} steps${time && `, ${time} left`}`);
      },
      convert(title, done, total) {
        if (now() - lastLine < LINE_INTERVAL && done < total) return;
        lastLine = now();
        say(`${title}: ${percent(done, total)}`);
      },
      stop: () => undefined,
    };
  }

  const format = '{bar} {value}/{total} steps  {time}';
  // A second Ctrl-C ends the process at once: the cursor and line wrapping stay as they are.
  const settings = { format, stream: output, barsize: BAR_WIDTH, clearOnComplete: true, linewrap: true };
  const bar = new SingleBar({ ...settings, gracefulExit: false, emptyOnZero: true }, Presets.shades_classic);
  let state: { done: number; total: number; time: string } | undefined;
  const stop = () => {
    if (bar.isActive) bar.stop();
  };
  return {
    say(text) {
      stop();
      say(text);
      if (state) bar.start(state.total, state.done, { time: state.time });
    },
    step(done, total) {
      const time = left(done, total);
      state = { done, total, time: done === 0 ? 'loading' : done === total ? 'decoding' : time && `${time} left` };
      if (bar.isActive) {
        bar.setTotal(total);
        bar.update(done, { time: state.time });
      } else {
        bar.start(total, done, { time: state.time });
      }
    },
    convert(title, done, total) {
      stop();
      // One line that is written over: conversions follow each other, each with its own name.
      output.write(`\r${title}: ${percent(done, total)}${done < total ? '' : '\n'}`);
    },
    stop() {
      stop();
      state = undefined;
    },
  };
}

function percent(done: number, total: number): string {
  return `${Math.floor((100 * done) / total)} %`;
}

/** Tells the time left from the steps after the first, which loads the model; empty while there is only the first. */
function timeLeft(now: () => number): (done: number, total: number) => string {
  let first: { done: number; time: number } | undefined;
  return (done, total) => {
    if (done === 0) return '';
    first ??= { done, time: now() };
    if (done === first.done) return '';
    return formatSeconds(((now() - first.time) / (done - first.done) / 1000) * (total - done));
  };
}

/** Such as 0:07, 12:34 or 1:02:03. */
export function formatSeconds(seconds: number): string {
  const whole = Math.ceil(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const two = (value: number) => String(value).padStart(2, '0');
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}
