/** Which precision a model is loaded in when nobody says. */

import { MmditxError } from '../errors.ts';
import type { Device } from '../runtime/runtime.ts';
import { bytesPerElement, elementCount } from '../tensor/data.ts';
import type { Checkpoint, PartName } from '../weights/checkpoint.ts';
import { needsConversion, type Precision, plannedTensors } from '../weights/convert.ts';

/** Bytes that each network's weights take in memory in a precision. */
export function weightBytes({ parts }: Checkpoint, precision: Precision): Map<PartName, number> {
  const sizes = new Map<PartName, number>();
  for (const [name, part] of Object.entries(parts) as [PartName, NonNullable<Checkpoint['parts'][PartName]>][]) {
    const expanded = precision === 'fp32' || name === 'vae';
    const bytes = expanded
      ? [...part.tensors.values()].reduce((sum, { shape }) => sum + 4 * elementCount(shape), 0)
      : plannedTensors(name, part, precision)
          .flatMap(({ tensors }) => [...tensors.values()])
          .reduce((sum, { dtype, shape }) => sum + elementCount(shape) * bytesPerElement[dtype], 0);
    sizes.set(name, bytes);
  }
  return sizes;
}

/** Memory that a picture needs beside the weights: the program, its buffers at 1024x1024, the decoder. */
const WORKING_BYTES = 1.5 * 2 ** 30;

/** What is needed at once: the largest network, because each can give its memory back before the next loads. */
export function neededBytes(checkpoint: Checkpoint, precision: Precision): number {
  const sizes = weightBytes(checkpoint, precision);
  // T5 runs a few layers at a time, from where its file is mapped.
  sizes.delete('t5');
  return Math.max(...sizes.values()) + WORKING_BYTES;
}

/** Bytes of all weights in float32 up to which a model counts as small: as fast as it gets, whatever the precision. */
const SMALL_MODEL_BYTES = 2 ** 30;

export interface PrecisionChoice {
  readonly precision: Precision;
  /** Whether networks give their memory back for the next: all together do not fit. */
  readonly release: boolean;
  /** One line for people: what was chosen and why. Absent for small models, where it makes no difference. */
  readonly reason?: string;
}

const descriptions: Readonly<Record<Precision, string>> = {
  fp32: '32-bit weights',
  fp16: '16-bit weights, as stored',
  int8: '8-bit weights',
  int4: '4-bit weights',
};

/**
 * The precision for a model: on a processor fp32 for small models and int8 for large ones, which no eye tells from fp32
 * and which is the fastest; int4 where int8 does not fit. Graphics devices take weights as they are stored.
 * @param wanted the user's choice, which is checked and kept
 * @param freeBytes memory that is free
 * @throws MmditxError `bad-option` when the memory does not suffice
 */
export function choosePrecision(
  checkpoint: Checkpoint,
  { wanted, device, freeBytes }: { wanted?: Precision | undefined; device: Device; freeBytes: number },
): PrecisionChoice {
  const whole = total(checkpoint, 'fp32');
  const candidates: readonly Precision[] = wanted
    ? [wanted]
    : whole <= SMALL_MODEL_BYTES
      ? ['fp32']
      : device === 'cpu'
        ? ['int8', 'int4']
        : ['fp16'];
  const fitting = candidates.find(
    (precision) => whole <= SMALL_MODEL_BYTES || neededBytes(checkpoint, precision) <= freeBytes,
  );
  if (!fitting) {
    const last = candidates.at(-1)!;
    const smaller = wanted && wanted !== 'int4' ? 'choose a smaller --precision or ' : '';
    throw new MmditxError(
      'bad-option',
      `The model needs about ${gibibytes(neededBytes(checkpoint, last))} of memory in ${last} and ${gibibytes(freeBytes)} is free; ${smaller}close other programs.`,
    );
  }
  const together = total(checkpoint, fitting) + WORKING_BYTES;
  const release = together > freeBytes * KEPT_SHARE;
  const size = `${gibibytes(total(checkpoint, fitting))} of weights`;
  const memory = `${gibibytes(freeBytes)} of memory free${release ? '; one network at a time' : ''}`;
  if (whole <= SMALL_MODEL_BYTES) return { precision: fitting, release };
  return { precision: fitting, release, reason: `${fitting} (${descriptions[fitting]}): ${size}, ${memory}` };
}
/** Share of the free memory that networks may keep between pictures. */
const KEPT_SHARE = 0.7;

function total(checkpoint: Checkpoint, precision: Precision): number {
  return [...weightBytes(checkpoint, precision).values()].reduce((sum, bytes) => sum + bytes, 0);
}

function gibibytes(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

/** Parts of a checkpoint whose files cannot be used in a precision as they lie. */
export function partsToConvert({ parts }: Checkpoint, precision: Precision): PartName[] {
  const entries = Object.entries(parts) as [PartName, NonNullable<Checkpoint['parts'][PartName]>][];
  return entries.filter(([name, part]) => needsConversion(name, part, precision)).map(([name]) => name);
}
