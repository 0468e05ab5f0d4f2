/** LoRAs made part of a model's weights, and several LoRAs made one. */

import { MmditxError } from '../errors.ts';
import { bytesPerElement, type DType, elementCount, type FloatTensor, type TypedArray } from '../tensor/data.ts';
import { type Checkpoint, type PartName, type PartWeights, partNames } from './checkpoint.ts';
import { convertedMetadata, partPrefixes, plannedTensors } from './convert.ts';
import { type CombinedChange, combineLoras, type Lora, type LoraUse } from './lora.ts';
import type { LoraPart } from './lora-names.ts';
import { encodeFloats, type LoraLayer, loraLayers } from './lora-write.ts';
import { quote } from './quote.ts';
import { type PlannedTensors, readExactly, viewAs } from './safetensors.ts';
import { type Encoding, isBlockType, readFloats, type WeightTensor } from './stored.ts';

/** A model with LoRAs merged into it, to be written as one file. */
export interface MergedModel {
  /** Tensors of all networks, read and changed when their turn comes: one weight is in memory at a time. */
  readonly plans: PlannedTensors[];
  readonly metadata: Record<string, string>;
  /** Number of weights that change. */
  readonly changed: number;
  /** Of those, how many are written in 16 bits as what they were stored in is too coarse for changes. */
  readonly widened: number;
  /** Networks that the LoRAs change and the model's files do not hold. */
  readonly absent: readonly LoraPart[];
}

/**
 * Plans the file of a model with `W + strength * alpha / rank * up @ down` in place of each W that LoRAs change, added
 * in float32 and rounded to the type that W has. Other tensors of the networks stay as they are, bit by bit, but for
 * what no program maps (blocks of GGUF, scaled fp8), which becomes float16.
 *
 * Weights in 8 bits or less are written as float16 where they change: most changes are smaller than half a step between
 * their values, so that rounding would undo them.
 *
 * @param parts the networks, whose files must stay open until the plans are carried out
 * @throws MmditxError `bad-option` for a LoRA that does not fit the model or changes nothing of it; `not-finite` from
 *   the plans where a changed weight is larger than its type can hold
 */
export function mergeLoras(parts: Checkpoint['parts'], loras: readonly LoraUse[]): MergedModel {
  const plans: PlannedTensors[] = [];
  let [changed, widened] = [0, 0];
  for (const part of partNames) {
    const weights = parts[part];
    if (!weights) continue;
    const changes = partChanges(part, weights, loras);
    changed += changes.size;
    for (const name of changes.keys()) if (isCoarse(weights.tensors.get(name)!)) widened++;
    plans.push(...mergedTensors(part, weights, changes, partPrefixes[part]));
  }
  const absent = (['transformer', 'clipL', 'clipG', 't5'] as const).filter(
    (part) => !parts[part] && loras.some(({ lora }) => lora.parts[part]?.size),
  );
  if (changed === 0) {
    throw new MmditxError(
      'bad-option',
      'The LoRAs change nothing of this model; give a strength other than 0 and the files of the networks they are for.',
    );
  }
  // The model is another one now.
  const metadata = Object.entries(convertedMetadata(parts)).filter(([key]) => !/^modelspec\.hash_/.test(key));
  return { plans, metadata: Object.fromEntries(metadata), changed, widened, absent };
}

function partChanges(
  part: PartName,
  { tensors }: PartWeights<unknown>,
  loras: readonly LoraUse[],
): Map<string, CombinedChange> {
  if (part === 'vae') return new Map();
  return combineLoras(loras, part, new Map([...tensors].map(([name, { shape }]) => [name, shape])));
}

/** The tensors of a network with changes, by their names in the file with `prefix` before them. Nothing is read yet. */
export function mergedTensors(
  part: PartName,
  weights: PartWeights<unknown>,
  changes: ReadonlyMap<string, CombinedChange>,
  prefix = '',
): PlannedTensors[] {
  return [...weights.tensors].flatMap(([name, weight]) => {
    const change = changes.get(name);
    const own = plainType(weight);
    if (change) return [merged(`${prefix}${name}`, weight, change)];
    if (own) return [copied(`${prefix}${name}`, weight, own)];
    return plannedTensors(part, { ...weights, tensors: new Map([[name, weight]]) }, 'fp16', prefix);
  });
}

/** The element type of all pieces of a weight; undefined where they have several, or scales or blocks. */
function plainType({ spans, quantized }: WeightTensor): DType | undefined {
  const types = new Set<Encoding>(spans.map(({ encoding }) => encoding));
  const [type] = types;
  if (quantized || types.size !== 1 || type === undefined || isBlockType(type)) return undefined;
  return spans.some(({ scale }) => scale !== undefined) ? undefined : type;
}

/** Element types that changes are rounded to. */
const fineTypes = ['float64', 'float32', 'float16', 'bfloat16'] as const satisfies readonly DType[];

function fineType(weight: WeightTensor): (typeof fineTypes)[number] | undefined {
  const type = plainType(weight);
  return fineTypes.find((fine) => fine === type);
}

function isCoarse(weight: WeightTensor): boolean {
  return fineType(weight) === undefined;
}

/** A weight as its files have it, pieces one after the other. */
function copied(name: string, { shape, spans }: WeightTensor, dtype: DType): PlannedTensors {
  return {
    tensors: new Map([[name, { dtype, shape }]]),
    async values() {
      const bytes = new Uint8Array(elementCount(shape) * bytesPerElement[dtype]);
      let end = 0;
      for (const { source, offset, byteLength } of spans) {
        bytes.set(await readExactly(source, offset, byteLength), end);
        end += byteLength;
      }
      return [viewAs(dtype, bytes)];
    },
  };
}

function merged(name: string, weight: WeightTensor, change: CombinedChange): PlannedTensors {
  const { shape } = weight;
  const dtype = fineType(weight) ?? 'float16';
  return {
    tensors: new Map([[name, { dtype, shape }]]),
    async values() {
      const sum = withProduct(await readFloats(weight), change);
      return [encoded(name, sum, dtype)];
    },
  };
}

function encoded(name: string, values: FloatTensor, dtype: (typeof fineTypes)[number]): TypedArray {
  try {
    const { data } = encodeFloats(name, values, dtype === 'float64' ? 'float32' : dtype);
    return dtype === 'float64' ? Float64Array.from(values.data) : data;
  } catch (cause) {
    throw new MmditxError(
      'not-finite',
      `The weight ${quote(name)} gets values that ${dtype} cannot hold; lower the strengths of the LoRAs.`,
      { cause },
    );
  }
}

/** Ranks that are added in one go over a row: twice as fast as one by one, as the row is read and written less. */
const STRIDE = 4;

/** `weight + up @ down`, row by row so that the product never lies in memory as a whole. */
function withProduct({ shape, data }: FloatTensor, { up, down }: CombinedChange): FloatTensor {
  const [rank, inputs] = down.shape as [number, number];
  const padded = Math.ceil(rank / STRIDE) * STRIDE;
  // In double precision, which JavaScript computes in: converting at each step would take longer.
  const wide = new Float64Array(padded * inputs);
  wide.set(down.data);
  const factors = new Float64Array(padded);
  const change = new Float64Array(inputs);
  const sum = new Float32Array(data.length);
  for (let row = 0; row < up.shape[0]!; row++) {
    factors.set(up.data.subarray(row * rank, (row + 1) * rank));
    change.fill(0);
    for (let i = 0; i < padded; i += STRIDE) {
      const [a, b, c, d] = [factors[i]!, factors[i + 1]!, factors[i + 2]!, factors[i + 3]!];
      // A LoRA for the queries alone leaves two thirds of the rows as they are.
      if (a === 0 && b === 0 && c === 0 && d === 0) continue;
      const [first, second, third, fourth] = [i * inputs, (i + 1) * inputs, (i + 2) * inputs, (i + 3) * inputs];
      for (let column = 0; column < inputs; column++) {
        change[column]! +=
          a * wide[first + column]! +
          b * wide[second + column]! +
          c * wide[third + column]! +
          d * wide[fourth + column]!;
      }
    }
    for (let column = 0; column < inputs; column++) {
      sum[row * inputs + column] = data[row * inputs + column]! + change[column]!;
    }
  }
  return { dtype: 'float32', shape, data: sum };
}

/**
 * Several LoRAs as one that does what they do together at these strengths, of the sum of their ranks: alphas and
 * strengths are in its matrices, and its own alpha is its rank.
 * @throws MmditxError `bad-option` for LoRAs of different models, a strength out of range, or no change at all
 */
export function joinLoras(loras: readonly LoraUse[]): LoraLayer[] {
  const whole = loras.map(({ lora, ...strengths }) => ({ lora: wholeRows(lora), ...strengths }));
  const layers: LoraLayer[] = [];
  for (const part of ['transformer', 'clipL', 'clipG', 't5'] as const) {
    const changes = combineLoras(whole, part, commonShapes(whole, part));
    for (const [weight, { up, down }] of changes) layers.push({ part, weight, up, down, alpha: down.shape[0]! });
  }
  if (layers.length === 0) {
    throw new MmditxError('bad-option', 'At these strengths the LoRAs change nothing; give one other than 0.');
  }
  return layers;
}

/** A LoRA with queries, keys and values in one change, which takes fewer ranks where they have a matrix in common. */
function wholeRows(lora: Lora): Lora {
  const layers = loraLayers(lora);
  const changes = (part: LoraPart) =>
    new Map(
      layers
        .filter((layer) => layer.part === part)
        .map(({ weight, down, up, alpha }) => {
          const outputs = up.shape[0]!;
          return [weight, [{ down, up, scale: alpha / down.shape[0]!, rows: [0, outputs] as const, outputs }]];
        }),
    );
  const parts = Object.keys(lora.parts) as LoraPart[];
  return { ...lora, parts: Object.fromEntries(parts.map((part) => [part, changes(part)])) };
}

/** The shapes of the weights that LoRAs change, on which they must agree. */
function commonShapes(loras: readonly LoraUse[], part: LoraPart): Map<string, readonly [number, number]> {
  const found = new Map<string, { shape: readonly [number, number]; name: string }>();
  for (const { lora } of loras) {
    for (const [weight, [change]] of lora.parts[part] ?? []) {
      const shape = [change!.outputs, change!.down.shape[1]!] as const;
      const other = found.get(weight);
      if (other && other.shape.join() !== shape.join()) {
        throw new MmditxError(
          'bad-option',
          `${other.name} and ${lora.name} are LoRAs for different models: they change ${quote(weight)} as ${quote(other.shape)} and ${quote(shape)}; give LoRAs for one model.`,
        );
      }
      found.set(weight, { shape, name: lora.name });
    }
  }
  return new Map([...found].map(([weight, { shape }]) => [weight, shape]));
}
