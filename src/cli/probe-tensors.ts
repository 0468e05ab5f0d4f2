/** The tensors a probe is given: found by name, checked against the shapes its part takes, converted. */
import { MmditxError } from '../errors.ts';
import { type FloatTensor, floats, type TensorData, toFloat32 } from '../tensor/data.ts';
import { fileSource } from '../weights/files.node.ts';
import { openSafetensors, readTensor } from '../weights/safetensors.ts';

/**
 * A shape to expect: lengths, and names for lengths that may differ from file to file but are the same wherever the
 * name stands. `batch or 1` is one item for all of the batch, or one for each.
 */
export type ExpectedShape = readonly (number | string)[];

export interface ProbeTensors {
  /** Values of any number format as float32. */
  floats(name: string, shape: ExpectedShape): Promise<FloatTensor>;
  /** Token ids of any integer format as int32, each at least 0 and below `vocabSize`. */
  ids(name: string, shape: ExpectedShape, vocabSize: number): Promise<TensorData>;
  close(): Promise<void>;
}

/** Names that a message lists at most. */
const LISTED_NAMES = 8;

const integerTypes = ['int64', 'int32', 'int16', 'int8', 'uint8'];

/** @throws MmditxError `io`, `bad-file`; its functions throw `missing-part` and `bad-option` */
export async function openProbeTensors(path: string): Promise<ProbeTensors> {
  const source = await fileSource(path);
  const { close } = source;
  const file = await openSafetensors(source).catch(async (error) => {
    await close();
    throw error;
  });
  const lengths = new Map<string, number>();

  const read = async (name: string, expected: ExpectedShape): Promise<TensorData> => {
    if (!file.tensors.has(name)) {
      const others = [...file.tensors.keys()].slice(0, LISTED_NAMES).join(', ') || 'none at all';
      throw new MmditxError('missing-part', `There is no tensor "${name}" in ${path}; it has ${others}.`);
    }
    const tensor = await readTensor(file, name);
    const wanted = expected.map((axis) =>
      lengths.has(String(axis)) ? `${axis} = ${lengths.get(String(axis))}` : axis,
    );
    if (!fits(tensor.shape, expected, lengths)) {
      throw new MmditxError(
        'bad-option',
        `The tensor "${name}" of ${path} has the shape [${tensor.shape.join(', ')}] where [${wanted.join(', ')}] is needed.`,
      );
    }
    return tensor;
  };
  return {
    close,
    async floats(name, expected) {
      const tensor = await read(name, expected);
      return floats(tensor.shape, toFloat32(tensor));
    },
    async ids(name, expected, vocabSize) {
      const { shape, dtype, data } = await read(name, expected);
      const ids = Int32Array.from(data as ArrayLike<number | bigint>, Number);
      if (!integerTypes.includes(dtype)) {
        throw new MmditxError('bad-option', `The tensor "${name}" of ${path} holds ${dtype} values; give integers.`);
      }
      const wrong = ids.find((id) => id < 0 || id >= vocabSize);
      if (wrong !== undefined) {
        throw new MmditxError(
          'bad-option',
          `The ${name} of ${path} hold ${wrong}; this encoder knows 0 to ${vocabSize - 1}.`,
        );
      }
      return { dtype: 'int32', shape, data: ids };
    },
  };
}

const OR_ONE = ' or 1';

/** Whether a shape is the expected one; names that have no length yet get theirs. */
function fits(shape: readonly number[], expected: ExpectedShape, lengths: Map<string, number>): boolean {
  if (shape.length !== expected.length) return false;
  return expected.every((axis, i) => {
    const length = shape[i]!;
    if (typeof axis === 'number') return length === axis;
    if (axis.endsWith(OR_ONE)) return length === 1 || length === lengths.get(axis.slice(0, -OR_ONE.length));
    if (!lengths.has(axis)) lengths.set(axis, length);
    return length > 0 && length === lengths.get(axis);
  });
}
