import { PassThrough } from 'node:stream';
import { describe, expect, it } from 'vitest';
import { createProgress, formatSeconds } from '../../src/cli/progress.ts';

/** A stream whose text can be taken, on a clock that is set by hand. */
function setUp(isTTY: boolean, quiet = false) {
  const stream = Object.assign(new PassThrough(), { isTTY, columns: 80 });
  let time = 0;
  const progress = createProgress(stream, { quiet, now: () => time });
  return {
    progress,
    text: () => String(stream.read() ?? ''),
    wait: (seconds: number) => {
      time += 1000 * seconds;
    },
  };
}

describe('progress on a terminal', () => {
  it('is a bar with the time left, which the slow first step does not count in', () => {
    const { progress, text, wait } = setUp(true);
    progress.step(0, 10);
    expect(text()).toMatch(/ 0\/10 steps {2}loading/);
    wait(100);
    progress.step(1, 10);
    wait(7);
    progress.step(2, 10);
    progress.stop();
    expect(text()).toMatch(/ 2\/10 steps {2}0:56 left/);
  });

  it('says that the pixels are still to come after the last step', () => {
    const { progress, text } = setUp(true);
    progress.step(4, 4);
    progress.stop();
    expect(text()).toMatch(/4\/4 steps {2}decoding/);
  });

  it('puts text on a line of its own and goes on', () => {
    const { progress, text } = setUp(true);
    progress.step(1, 4);
    text();
    progress.say('Warning: a word was cut.');
    expect(text()).toMatch(/Warning: a word was cut\.\n.* 1\/4 steps/s);
    progress.stop();
    progress.say('end');
    expect(text()).toMatch(/end\n$/);
  });
});

describe('progress elsewhere', () => {
  it('is a line every ten seconds', () => {
    const { progress, text, wait } = setUp(false);
    for (let step = 0; step <= 30; step++) {
      progress.step(step, 30);
      wait(1);
    }
    progress.stop();
    expect(text()).toBe('10 of 30 steps, 0:20 left\n20 of 30 steps, 0:10 left\n');
  });

  it('is nothing when it is to be quiet, but warnings are', () => {
    for (const isTTY of [true, false]) {
      const { progress, text, wait } = setUp(isTTY, true);
      progress.step(0, 30);
      wait(60);
      progress.step(1, 30);
      progress.say('Warning: a word was cut.');
      progress.stop();
      expect(text()).toBe('Warning: a word was cut.\n');
    }
  });
});

it.each([
  [0, '0:00'],
  [6.2, '0:07'],
  [754, '12:34'],
  [3723, '1:02:03'],
])('%d seconds are %s', (seconds, text) => {
  expect(formatSeconds(seconds)).toBe(text);
});
