import { PassThrough } from 'node:stream';
import { describe, expect, it } from 'vitest';
import { createTrainProgress } from '../../src/cli/train-progress.ts';
import type { TrainEvent } from '../../src/training/log.ts';

const TIME = '2026-01-02T03:04:05.000Z';
const start: TrainEvent = {
  type: 'start',
  time: TIME,
  name: 'run',
  stages: [
    { name: 'vae', steps: 40 },
    { name: 'base', steps: 3000 },
  ],
  settings: {},
};
const stepEvent = (step: number, loss = 0.5, seconds = 2): TrainEvent => {
  return { type: 'step', time: TIME, stage: 1, step, loss, norm: 1, learningRate: 1e-4, seconds };
};

/** A stream whose text can be taken, on a clock that is set by hand. */
function setUp(isTTY: boolean, quiet = false, columns = 120) {
  const stream = Object.assign(new PassThrough(), { isTTY, columns });
  let time = 0;
  const progress = createTrainProgress(stream, { quiet, now: () => time });
  progress.event(start);
  return {
    progress,
    text: () => String(stream.read() ?? ''),
    wait: (seconds: number) => {
      time += 1000 * seconds;
    },
  };
}

describe('training progress on a terminal', () => {
  it('is one line of stage, step, loss, learning rate, speed and time left, without the first step', () => {
    const { progress, text, wait } = setUp(true);
    progress.event(stepEvent(1001, 0.5, 60));
    expect(text()).toMatch(/base 2\/2 .* 1001\/3000 {2}loss 0\.5000 {2}lr 1e-4 {2}60 s\/step/);
    wait(3);
    progress.event(stepEvent(1002));
    progress.stop();
    // 1998 steps of 3 s, pauses included; 2 s are what a step takes.
    expect(text()).toMatch(/1002\/3000 {2}loss 0\.5000 {2}lr 1e-4 {2}2 s\/step {2}1:39:54 left/);
  });

  it('shows a loss that follows slowly', () => {
    const { progress, text } = setUp(true);
    for (const loss of [1, 0]) progress.event(stepEvent(loss === 1 ? 1 : 2, loss));
    progress.stop();
    // Window 60: (59/60) / (59/60 + 1).
    expect(text()).toMatch(/loss 0\.4958/);
  });

  it('fits into a narrow terminal', () => {
    const { progress, text } = setUp(true, false, 60);
    progress.event(stepEvent(1001));
    progress.stop();
    // biome-ignore lint/suspicious/noControlCharactersInRegex: what a terminal is told
    for (const line of text().split(/\u001b\[[\d;?]*[A-Za-z]|\n|\r/)) expect(line.length).toBeLessThanOrEqual(60);
  });

  it('puts notes and validation on lines of their own', () => {
    const { progress, text } = setUp(true);
    progress.event(stepEvent(5));
    text();
    progress.event({ type: 'note', time: TIME, stage: 1, step: 5, message: 'A picture was left out.' });
    expect(text()).toMatch(/A picture was left out\.\n.* 5\/3000/s);
    progress.event({ type: 'validation', stage: 1, step: 5, losses: [], mean: 0.25 });
    expect(text()).toMatch(/base 2\/2: validation loss 0\.2500 after 5 steps\n/);
    progress.event({ type: 'end', time: TIME, stage: 1, step: 5, reason: 'stopped' });
    text();
    progress.say('end');
    expect(text()).toBe('end\n');
  });
});

describe('training progress elsewhere', () => {
  it('is a line every thirty seconds and at the end of a stage', () => {
    const { progress, text, wait } = setUp(false);
    for (let step = 2955; step <= 3000; step++) {
      progress.event(stepEvent(step));
      wait(2);
    }
    expect(text().trimEnd().split('\n')).toEqual([
      'base 2/2: 2,970 of 3,000 steps, loss 0.5000, lr 1e-4, 2 s/step, 1:00 left',
      'base 2/2: 2,985 of 3,000 steps, loss 0.5000, lr 1e-4, 2 s/step, 0:30 left',
      'base 2/2: 3,000 of 3,000 steps, loss 0.5000, lr 1e-4, 2 s/step, 0:00 left',
    ]);
  });

  it('is nothing but notes when it is to be quiet', () => {
    for (const isTTY of [true, false]) {
      const { progress, text, wait } = setUp(isTTY, true);
      progress.event(stepEvent(1));
      wait(60);
      progress.event(stepEvent(2));
      progress.event({ type: 'samples', stage: 1, step: 2, pictures: [] });
      progress.event({ type: 'note', time: TIME, stage: 1, step: 2, message: 'A picture was left out.' });
      expect(text()).toBe('A picture was left out.\n');
    }
  });
});
