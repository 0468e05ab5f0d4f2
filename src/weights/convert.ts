/** Writing networks anew in another precision, in a file that can be mapped into memory as it is. */

import { MmditxError } from '../errors.ts';
import { INT4_BLOCK, type QuantizedPrecision, toFloat16 } from '../tensor/index.ts';
import type { Checkpoint, PartName, PartWeights } from './checkpoint.ts';
import { configMetadata } from './metadata.ts';
import { quantize, quantizedPlan } from './quantized.ts';
import { quote } from './quote.ts';
import type { PlannedTensors } from './safetensors.ts';
import { isBlockType, readFloats, readSpan, type Span, type WeightTensor } from './stored.ts';

/**
 * What weights are kept as: `fp32` expanded to float32 in memory; `fp16` as the file stores them, in 16 bits (float16
 * or bfloat16) or less; `int8` and `int4` the linear layers as integers with scales.
 */
export const PRECISIONS = ['fp32', 'fp16', 'int8', 'int4'] as const;
export type Precision = (typeof PRECISIONS)[number];

/** What names of tensors begin with in an all-in-one file (Stability-AI/sd3.5; ComfyUI for the text encoders). */
export const partPrefixes: Readonly<Record<PartName, string>> = {
  transformer: 'model.diffusion_model.',
  vae: 'first_stage_model.',
  clipL: 'text_encoders.clip_l.transformer.',
  clipG: 'text_encoders.clip_g.transformer.',
  t5: 'text_encoders.t5xxl.transformer.',
};

/**
 * The linear layers of each network's blocks: nearly all of its weights. Embeddings, norms and the layers that run
 * once (timestep, pooled text, output) stay as they are, and so does the VAE, whose convolutions have no integer form.
 */
const quantizable: Readonly<Record<PartName, RegExp | undefined>> = {
  transformer: /^joint_blocks\..*\.weight$/,
  vae: undefined,
  clipL: /^text_model\.encoder\.layers\..*\.weight$/,
  clipG: /^text_model\.encoder\.layers\..*\.weight$/,
  t5: /^encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.\w+)\.weight$/,
};
/** In int4, modulation stays in int8: an error in a shift or gate is an error in every token. */
const MODULATION = /\.adaLN_modulation\.1\.weight$/;

/** The precision a weight gets when its network is converted; undefined where it keeps its own. */
function targetOf(
  part: PartName,
  name: string,
  { shape }: WeightTensor,
  precision: Precision,
): QuantizedPrecision | undefined {
  if (precision !== 'int8' && precision !== 'int4') return undefined;
  if (shape.length !== 2 || !quantizable[part]?.test(name)) return undefined;
  return precision === 'int8' || MODULATION.test(name) || shape[1]! % INT4_BLOCK !== 0 ? 'int8' : 'int4';
}

/**
 * Whether a network's file cannot be used in a precision as it lies: its weights would be quantised, or are stored in
 * blocks or with scales that no program reads.
 */
export function needsConversion(part: PartName, { tensors }: PartWeights<unknown>, precision: Precision): boolean {
  return [...tensors].some(
    ([name, weight]) =>
      (!weight.quantized && targetOf(part, name, weight, precision) !== undefined) ||
      weight.spans.some(({ encoding }) => isBlockType(encoding)),
  );
}

/** The tensors of a network in a precision, by their names in the file with `prefix` before them. Nothing is read yet. */
export function plannedTensors(
  part: PartName,
  { tensors }: PartWeights<unknown>,
  precision: Precision,
  prefix = '',
): PlannedTensors[] {
  return [...tensors].map(([name, weight]) => {
    const target = targetOf(part, name, weight, precision);
    return weight.quantized || !target
      ? kept(`${prefix}${name}`, weight)
      : quantizedTo(`${prefix}${name}`, weight, target);
  });
}

function quantizedTo(name: string, weight: WeightTensor, precision: QuantizedPrecision): PlannedTensors {
  return {
    tensors: quantizedPlan(name, weight.shape as [number, number], precision),
    async values() {
      const [values, scales] = quantize(name, await readFloats(weight), precision);
      if (!scales.every(Number.isFinite)) throw notFinite(weight);
      return [values, scales];
    },
  };
}

function notFinite({ name, spans }: WeightTensor): MmditxError {
  return new MmditxError(
    'bad-file',
    `The weight ${quote(name)} in ${spans[0]!.source.name} has values that are not finite; download the file again.`,
  );
}

/** A weight that is not quantised now: integers and plain tensors as they are, vectors in float32, others in half precision. */
function kept(name: string, weight: WeightTensor): PlannedTensors {
  const { shape, spans, quantized } = weight;
  if (quantized) {
    const pieces = [spans, quantized.scales];
    return {
      // In the parts it has, as older files may have others.
      tensors: quantizedPlan(name, shape as [number, number], quantized.precision, spans.length),
      values: () => Promise.all(pieces.map((parts) => readSpan(uncut(parts)))),
    };
  }
  // Programs would convert these small ones at each run.
  if (shape.length < 2) {
    return {
      tensors: new Map([[name, { dtype: 'float32', shape }]]),
      values: async () => [(await readFloats(weight)).data],
    };
  }
  const [span, ...more] = spans as [Span, ...Span[]];
  if (more.length === 0 && span.scale === undefined && !isBlockType(span.encoding)) {
    return { tensors: new Map([[name, { dtype: span.encoding, shape }]]), values: async () => [await readSpan(span)] };
  }
  return {
    tensors: new Map([[name, { dtype: 'float16', shape }]]),
    values: async () => [toFloat16((await readFloats(weight)).data)],
  };
}

/** The tensor of a file that equal pieces were cut from. */
function uncut(parts: readonly Span[]): Span {
  const [first] = parts as [Span, ...Span[]];
  return { ...first, byteLength: parts.reduce((sum, { byteLength }) => sum + byteLength, 0) };
}

/** Metadata of a converted file: what its networks cannot tell by their shapes, and whatever their own files said. */
export function convertedMetadata(parts: Checkpoint['parts']): Record<string, string> {
  const own = Object.values(parts).map((part) => part?.metadata ?? {});
  const configs = Object.fromEntries(Object.entries(parts).map(([name, part]) => [name, part?.config]));
  return { ...Object.assign({}, ...own), ...configMetadata(configs) };
}
