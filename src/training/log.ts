/** The log of a training run: one event a line, as JSON, in the order things happened. */

import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { parseJson, shortList } from '../weights/json.ts';

/** Where in a run something happened. */
export interface RunPosition {
  /** Index of the stage, from 0. */
  readonly stage: number;
  /** Steps taken in the stage: the first step is 1, and 0 is before it. */
  readonly step: number;
}

/** A process begins to work on the run: once in a run that is never interrupted. */
export interface StartEvent {
  readonly type: 'start';
  /** ISO 8601, as all times here. */
  readonly time: string;
  readonly name: string;
  readonly stages: readonly { readonly name: string; readonly steps: number }[];
  /** The configuration with its defaults, as JSON. */
  readonly settings: Readonly<Record<string, unknown>>;
  /** What was found in the data sets, as text. */
  readonly data?: string | undefined;
  /** Steps of all stages that earlier processes have taken. */
  readonly resumedFrom?: number | undefined;
}

export interface StepEvent extends RunPosition {
  readonly type: 'step';
  readonly time: string;
  readonly loss: number;
  /** Global norm of the gradients before clipping. */
  readonly norm: number;
  readonly learningRate: number;
  /** What the step took. */
  readonly seconds: number;
  /** Width and height of the batch in pixels. */
  readonly size?: readonly [width: number, height: number] | undefined;
  readonly epoch?: number | undefined;
  readonly metrics?: Readonly<Record<string, number>> | undefined;
}

/** Losses on pictures that are held out, each at one noise level. */
export interface ValidationEvent extends RunPosition {
  readonly type: 'validation';
  readonly losses: readonly { readonly sigma: number; readonly loss: number }[];
  readonly mean: number;
}

export interface SamplesEvent extends RunPosition {
  readonly type: 'samples';
  readonly pictures: readonly SamplePicture[];
}

export interface SamplePicture {
  readonly prompt: string;
  readonly seed: number;
  /** Path from the folder of the run. */
  readonly file: string;
  readonly width: number;
  readonly height: number;
}

export interface CheckpointEvent extends RunPosition {
  readonly type: 'checkpoint';
  readonly file: string;
}

/** Something people should know, such as a picture that could not be read. */
export interface NoteEvent extends RunPosition {
  readonly type: 'note';
  readonly time: string;
  readonly message: string;
}

/** The process ends; one that is killed leaves none. */
export interface EndEvent extends RunPosition {
  readonly type: 'end';
  readonly time: string;
  readonly reason: 'finished' | 'stopped' | 'failed';
  readonly message?: string | undefined;
}

/** A line of the log. Numbers that are not finite are null in the file and NaN when they are read. */
export type TrainEvent =
  | StartEvent
  | StepEvent
  | ValidationEvent
  | SamplesEvent
  | CheckpointEvent
  | NoteEvent
  | EndEvent;

/** More than anybody writes down, few enough to make a list of. */
const MAX_STAGES = 1000;
const MAX_SIGMAS = 1000;
const MAX_PICTURES = 1000;
const MAX_SIDE = 2 ** 16;

const number = z
  .number()
  .nullable()
  .transform((value) => value ?? Number.NaN);
const count = z.int().nonnegative();
const side = z.int().positive().max(MAX_SIDE);
const position = { stage: count.max(MAX_STAGES - 1), step: count };

const start = z.object({
  type: z.literal('start'),
  time: z.string(),
  name: z.string(),
  stages: shortList(z.object({ name: z.string(), steps: count }), MAX_STAGES),
  settings: z.record(z.string(), z.unknown()),
  data: z.string().optional(),
  resumedFrom: count.optional(),
});
const step = z.object({
  type: z.literal('step'),
  ...position,
  time: z.string(),
  loss: number,
  norm: number,
  learningRate: number,
  seconds: number,
  size: z.tuple([side, side]).optional(),
  epoch: z.number().optional(),
  metrics: z.record(z.string(), number).optional(),
});
const validation = z.object({
  type: z.literal('validation'),
  ...position,
  losses: shortList(z.object({ sigma: z.number(), loss: number }), MAX_SIGMAS),
  mean: number,
});
const picture = z.object({ prompt: z.string(), seed: z.number(), file: z.string(), width: side, height: side });
const samples = z.object({
  type: z.literal('samples'),
  ...position,
  pictures: shortList(picture, MAX_PICTURES),
});
const checkpoint = z.object({ type: z.literal('checkpoint'), ...position, file: z.string() });
const note = z.object({ type: z.literal('note'), ...position, time: z.string(), message: z.string() });
const end = z.object({
  type: z.literal('end'),
  ...position,
  time: z.string(),
  reason: z.enum(['finished', 'stopped', 'failed']),
  message: z.string().optional(),
});
const event: z.ZodType<TrainEvent> = z.discriminatedUnion('type', [
  start,
  step,
  validation,
  samples,
  checkpoint,
  note,
  end,
]);

/**
 * An event from its line; undefined when the line is none, because it was torn by a crash or is of a newer version.
 * @param line without its line feed
 */
export function parseTrainEvent(line: string): TrainEvent | undefined {
  let value: unknown;
  try {
    value = parseJson(line, (fault) => new MmditxError('bad-file', `A line of the log ${fault}.`));
  } catch {
    return undefined;
  }
  return event.safeParse(value).data;
}

/** Negative when a comes before b in a run. */
export function comparePositions(a: RunPosition, b: RunPosition): number {
  return a.stage - b.stage || a.step - b.step;
}
