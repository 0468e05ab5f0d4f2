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
  /** Whether the largest attention logit is a metric, where everything is one program. */
  readonly attentionLogits?: boolean | undefined;
}

/** Name of the metric. */
export const ATTENTION_LOGIT = 'attention logit';

/**
 * The segments whose last gives the loss. They take the batch's `latent`, `target`, `timestep`, `corner`, and `context`
 * and `pooled`, or what {@link encodedText} takes.
 */
export function diffusionSegments(options: ObjectiveOptions): Segment[] {
  const { config, transformer, encoders, checkpointing, weighted, attentionLogits } = options;
  const end = stageCount(config);
  const lossOf = (program: t.Program) => ({
    loss: velocityError(program.outputs.velocity!, weighted ? { weighted } : {}),
  });
  const parts = [transformer, ...Object.values(encoders ?? {}).map(({ part }) => part)];
  if (checkpointing === undefined && inOneFolder(parts)) {
    const given = encoders && encodedText(encoders);
    const outputs = lossOf(mmditxSegment(config, transformer.weights, 0, end, given));
    const logit = attentionLogits ? t.largestAttentionLogit([outputs.loss]) : undefined;
    return [{ outputs: { ...outputs, ...(logit && { [ATTENTION_LOGIT]: logit }) }, ...joinParts(parts) }];
  }
  const segments: Segment[] = encoders ? encoderSegments(encoders) : [];
  const blocks = checkpointing ?? config.depth;
  for (let start = 0; start < end; ) {
    // The embedding goes with the first blocks, the output with the last.
    const next = Math.max(start, stageOf(0)) + blocks;
    const stop = next >= stageOf(config.depth) ? end : next;
    const program = mmditxSegment(config, transformer.weights, start, stop);
    segments.push({ outputs: stop === end ? lossOf(program) : program.outputs, ...joinParts([transformer]) });
    start = stop;
  }
  return segments;
}

/** One program takes files from one folder only. */
function inOneFolder(parts: readonly TrainedPart[]): boolean {
  return new Set(parts.flatMap(({ folders }) => folders)).size <= 1;
}

type ClipName = 'clipL' | 'clipG';

/** Each encoder by itself, and then their outputs joined. */
function encoderSegments(encoders: TrainedEncoders): Segment[] {
  const batch = batchSymbol;
  const output = (name: string, shape: t.Shape) => t.input(name, 'float32', shape);
  const clips = (['clipL', 'clipG'] as const).map((name) => {
    const { hidden, pooled } = clipOutputs(name, encoders[name]);
    return { outputs: { [`${name}.hidden`]: hidden, [`${name}.pooled`]: pooled }, ...joinParts([encoders[name].part]) };
  });
  const given = (name: ClipName) => {
    const { positions, width, pooledWidth } = encoders[name].config;
    return {
      hidden: output(`${name}.hidden`, [batch, positions, width]),
      pooled: output(`${name}.pooled`, [batch, pooledWidth]),
    };
  };
  const { tokens, width } = encoders.t5.config;
  const joined = joinEncoders(given('clipL'), given('clipG'), output('t5.hidden', [batch, tokens, width]));
  return [
    ...clips,
    { outputs: { 't5.hidden': t5Output(encoders.t5) }, ...joinParts([encoders.t5.part]) },
    { outputs: { ...joined }, ...joinParts([]) },
  ];
}

/**
 * Text encoded inside the program. Inputs for `clipL` and `clipG`: `.ids` [batch, positions], `.end` (where each text
 * ends) and `.keep` [batch, 1], 0 where the encoder is dropped; for `t5`: `.ids`, `.buckets` and `.keep`.
 */
export function encodedText(encoders: TrainedEncoders): Pick<TransformerInputs, 'context' | 'pooled'> {
  const { clipL, clipG, t5 } = encoders;
  return joinEncoders(clipOutputs('clipL', clipL), clipOutputs('clipG', clipG), t5Output(t5));
}

const batchSymbol = t.symbol('batch');
const keepInput = (name: string) => t.input(`${name}.keep`, 'float32', [batchSymbol, 1]);
const idsInput = (name: string, length: number) => t.input(`${name}.ids`, 'int32', [batchSymbol, length]);

function clipOutputs(name: ClipName, { config, part }: TrainedEncoders[ClipName]) {
  const end = t.input(`${name}.end`, 'int64', [batchSymbol]);
  const { hidden, pooled } = clip(config, part.weights, { ids: idsInput(name, config.positions), end });
  const kept = keepInput(name);
  return { hidden: t.multiply(hidden, t.reshape(kept, [batchSymbol, 1, 1])), pooled: t.multiply(pooled, kept) };
}

function t5Output({ config, part }: TrainedEncoders['t5']): t.Tensor {
  const { tokens } = config;
  const buckets = t.input('t5.buckets', 'int32', [tokens, tokens]);
  const hidden = t5Encoder(config, part.weights, { ids: idsInput('t5', tokens), buckets });
  return t.multiply(hidden, t.reshape(keepInput('t5'), [batchSymbol, 1, 1]));
}
