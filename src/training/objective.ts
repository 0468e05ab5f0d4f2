/** The computation of the diffusion loss for training: in one program, or in segments of the transformer. */

import { clip } from '../models/clip.ts';
import { joinEncoders } from '../models/conditioning.ts';
import type { ClipConfig, T5Config, TransformerConfig } from '../models/config.ts';
import { mmditxSegment, stageCount, stageOf, type TransformerInputs } from '../models/mmditx.ts';
import { t5Encoder } from '../models/t5.ts';
import * as t from '../tensor/index.ts';
import type { Segment } from './gradients.ts';
import { velocityError } from './loss.ts';
import { joinParts, type TrainedPart } from './parts.ts';

/** The three text encoders in a training program. */
export interface TrainedEncoders {
  readonly clipL: { readonly config: ClipConfig; readonly part: TrainedPart };
  readonly clipG: { readonly config: ClipConfig; readonly part: TrainedPart };
  readonly t5: { readonly config: T5Config; readonly part: TrainedPart };
}

export interface ObjectiveOptions {
  readonly config: TransformerConfig;
  readonly transformer: TrainedPart;
  /** Text encoders that are trained, too; without them the batch brings `context` and `pooled`. */
  readonly encoders?: TrainedEncoders | undefined;
  /** Joint blocks of a segment; without it everything is one program, which keeps all activations. */
  readonly checkpointing?: number | undefined;
  /** Whether the batch brings a `weight` for each item. */
  readonly weighted?: boolean;
}

/**
 * The segments whose last gives the loss. They take the batch's `latent`, `target`, `timestep`, `corner`, and `context`
 * and `pooled`, or what {@link encodedText} takes.
 */
export function diffusionSegments(options: ObjectiveOptions): Segment[] {
  const { config, transformer, encoders, checkpointing, weighted } = options;
  const end = stageCount(config);
  const lossOf = (program: t.Program) => ({
    loss: velocityError(program.outputs.velocity!, weighted ? { weighted } : {}),
  });
  if (checkpointing === undefined) {
    const given = encoders && encodedText(encoders);
    const parts = encoders ? [transformer, ...Object.values(encoders).map(({ part }) => part)] : [transformer];
    return [{ outputs: lossOf(mmditxSegment(config, transformer.weights, 0, end, given)), ...joinParts(parts) }];
  }
  const segments: Segment[] = encoders
    ? [{ outputs: { ...encodedText(encoders) }, ...joinParts(Object.values(encoders).map(({ part }) => part)) }]
    : [];
  for (let start = 0; start < end; ) {
    // The embedding goes with the first blocks, the output with the last.
    const next = Math.max(start, stageOf(0)) + checkpointing;
    const stop = next >= stageOf(config.depth) ? end : next;
    const program = mmditxSegment(config, transformer.weights, start, stop);
    segments.push({ outputs: stop === end ? lossOf(program) : program.outputs, ...joinParts([transformer]) });
    start = stop;
  }
  return segments;
}

/**
 * Text encoded inside the program. Inputs for `clipL` and `clipG`: `.ids` [batch, positions], `.end` (where each text
 * ends) and `.keep` [batch, 1], 0 where the encoder is dropped; for `t5`: `.ids`, `.buckets` and `.keep`.
 */
export function encodedText({ clipL, clipG, t5 }: TrainedEncoders): Pick<TransformerInputs, 'context' | 'pooled'> {
  const batch = t.symbol('batch');
  const ids = (name: string, length: number) => t.input(`${name}.ids`, 'int32', [batch, length]);
  const keep = (name: string) => t.input(`${name}.keep`, 'float32', [batch, 1]);
  const clipOf = (name: string, { config, part }: TrainedEncoders['clipL']) => {
    const inputs = { ids: ids(name, config.positions), end: t.input(`${name}.end`, 'int64', [batch]) };
    const { hidden, pooled } = clip(config, part.weights, inputs);
    const kept = keep(name);
    return { hidden: t.multiply(hidden, t.reshape(kept, [batch, 1, 1])), pooled: t.multiply(pooled, kept) };
  };
  const { tokens } = t5.config;
  const buckets = t.input('t5.buckets', 'int32', [tokens, tokens]);
  const hidden = t5Encoder(t5.config, t5.part.weights, { ids: ids('t5', tokens), buckets });
  const t5Hidden = t.multiply(hidden, t.reshape(keep('t5'), [batch, 1, 1]));
  return joinEncoders(clipOf('clipL', clipL), clipOf('clipG', clipG), t5Hidden);
}
