import { describe, expect, it } from 'vitest';
import { comparePositions, parseTrainEvent, type TrainEvent } from '../../src/training/log.ts';

const TIME = '2026-01-02T03:04:05.000Z';

const events: TrainEvent[] = [
  { type: 'start', time: TIME, name: 'run', stages: [{ name: 'base', steps: 9 }], settings: { a: [1, { b: null }] } },
  {
    type: 'step',
    time: TIME,
    stage: 0,
    step: 1,
    loss: 0.5,
    norm: 2,
    learningRate: 1e-4,
    seconds: 0.1,
    size: [64, 128],
    epoch: 0,
    metrics: { edges: 0.25 },
  },
  { type: 'validation', stage: 0, step: 1, losses: [{ sigma: 0.5, loss: 1 }], mean: 1 },
  { type: 'samples', stage: 0, step: 1, pictures: [{ prompt: 'a\nb', seed: 1, file: 'c.png', width: 8, height: 9 }] },
  { type: 'checkpoint', stage: 0, step: 1, file: 'checkpoints/d.safetensors' },
  { type: 'note', time: TIME, stage: 0, step: 1, message: 'e' },
  { type: 'end', time: TIME, stage: 0, step: 1, reason: 'failed', message: 'f' },
];

describe('parseTrainEvent', () => {
  it.each(events)('reads what was written: $type', (event) => {
    expect(parseTrainEvent(JSON.stringify(event))).toEqual(event);
  });

  it('is undefined for a line torn anywhere', () => {
    const line = JSON.stringify(events[1]);
    for (let length = 0; length < line.length; length++) expect(parseTrainEvent(line.slice(0, length))).toBeUndefined();
  });

  it('reads numbers that are not finite as NaN', () => {
    const line = JSON.stringify({ ...events[2], mean: Number.POSITIVE_INFINITY });
    expect(line).toContain('"mean":null');
    expect(parseTrainEvent(line)).toMatchObject({ mean: Number.NaN });
  });

  it.each([
    ['an event of a newer version', { type: 'party', stage: 0, step: 1 }],
    ['a missing number', { ...events[1], loss: undefined }],
    ['a stage no run has', { ...events[4], stage: 1e9 }],
    ['a negative step', { ...events[4], step: -1 }],
    ['half a step', { ...events[4], step: 0.5 }],
    ['more stages than a run has', { ...events[0], stages: Array(2000).fill({ name: 'a', steps: 1 }) }],
    ['a picture without width', { ...events[3], pictures: [{ prompt: '', seed: 0, file: '', width: 0, height: 1 }] }],
    ['no object', [1]],
  ])('is undefined for %s', (_, value) => {
    expect(parseTrainEvent(JSON.stringify(value))).toBeUndefined();
  });
});

it('orders positions by stage, then step', () => {
  const positions = [
    { stage: 1, step: 0 },
    { stage: 0, step: 20 },
    { stage: 0, step: 3 },
  ];
  expect(positions.sort(comparePositions).map(({ stage, step }) => [stage, step])).toEqual([
    [0, 3],
    [0, 20],
    [1, 0],
  ]);
});
