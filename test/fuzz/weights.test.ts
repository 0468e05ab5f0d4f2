/** Weights from outside: safetensors, GGUF, checkpoints of both, LoRAs. */
import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { modelDefaults, storedPreviewFactors } from '../../src/pipeline/defaults.ts';
import { bytesPerElement, elementCount } from '../../src/tensor/data.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { openGguf } from '../../src/weights/gguf.ts';
import { blockFormats } from '../../src/weights/gguf-blocks.ts';
import { findNonFinite, formatInspection, inspectCheckpoint } from '../../src/weights/inspect.ts';
import { combineLoras, openLora } from '../../src/weights/lora.ts';
import type { LoraPart } from '../../src/weights/lora-names.ts';
import { configMetadata } from '../../src/weights/metadata.ts';
import { openSafetensors, readTensor } from '../../src/weights/safetensors.ts';
import { isBlockType, readFloats, readWeight, wholeTensor } from '../../src/weights/stored.ts';
import { countedSource, expectLine, fuzz } from '../support/fuzz.ts';
import {
  byteChanges,
  changedBytes,
  changedTensors,
  type Field,
  jsonChanges,
  listTensors,
  safetensorsFile,
  type TensorList,
  tensorChanges,
} from '../support/mutations.ts';

const fixture = (path: string) => new Uint8Array(readFileSync(new URL(`../${path}`, import.meta.url)));
const layouts = (name: string) => listTensors(fixture(`fixtures/layouts/${name}.safetensors`));

const official = layouts('official');
/** Integers with scales, as this package writes them. */
const integers: TensorList = {
  metadata: {},
  tensors: [
    { name: 'a.qkv.weight', dtype: 'I8', shape: [3, 4, 2], data: new Uint8Array(24).fill(5) },
    { name: 'a.qkv.weight.int8_scale', dtype: 'F32', shape: [6], data: new Uint8Array(24).fill(0x3f) },
    { name: 'b.weight', dtype: 'I8', shape: [4, 2], data: new Uint8Array(8).fill(5) },
    { name: 'b.weight.int8_scale', dtype: 'F32', shape: [2], data: new Uint8Array(8).fill(0x3f) },
    { name: 'c.weight', dtype: 'U8', shape: [2, 1, 16], data: new Uint8Array(32).fill(0x77) },
    { name: 'c.weight.int4_scale', dtype: 'F32', shape: [2, 1], data: new Uint8Array(8).fill(0x3f) },
    // Empty ones may have any other size, too.
    { name: 'd.weight', dtype: 'I8', shape: [1, 4, 0], data: new Uint8Array(0) },
    { name: 'd.weight.int8_scale', dtype: 'F32', shape: [0], data: new Uint8Array(0) },
  ],
};
const transformer = part(official, 'model.diffusion_model.');
/** What a model says about itself, with all that is read. */
const metadata = {
  ...configMetadata((await configsOf(official)) as Parameters<typeof configMetadata>[0]),
  'mmditx.defaults': '{"width":64,"height":64,"steps":4,"cfg":3,"shift":2,"sampler":"euler","skipLayers":[1]}',
  'mmditx.preview': '{"weights":[[1,2,3],[4,5,6]],"bias":[0,0,0]}',
  _quantization_metadata: '{"layers":{"a":{"format":"float8_e4m3fn"}}}',
};
const whole: readonly TensorList[] = [
  official,
  { ...official, metadata },
  part({ ...official, metadata }, 'text_encoders.clip_l.'),
  part(official, 'text_encoders.'),
  transformer,
  part(official, 'first_stage_model.'),
  ...['scaled-older', 'scaled-newer', 'vae-old-names'].map(layouts),
  layouts('diffusers/text_encoder/model'),
  layouts('diffusers/text_encoder_3/model'),
  { metadata: {}, tensors: [...integers.tensors, ...transformer.tensors] },
];
const shards = [1, 2, 3].map((n) => layouts(`diffusers/transformer/diffusion_pytorch_model-0000${n}-of-00003`));
const checkpoints = [...whole, ...shards];
const safetensors = [...checkpoints, layouts('numbers'), integers];

async function configsOf(list: TensorList): Promise<Record<string, unknown>> {
  const { parts } = await openCheckpoint([countedSource(safetensorsFile(list))]);
  return Object.fromEntries(Object.entries(parts).map(([name, { config }]) => [name, config]));
}

test('the files are sound before they are changed', async () => {
  for (const list of whole) expect(Object.keys(await configsOf(list))).not.toEqual([]);
});

function part({ metadata, tensors }: TensorList, prefix: string): TensorList {
  return { metadata, tensors: tensors.filter(({ name }) => name.startsWith(prefix)) };
}

/** A file of one of the lists, as fast-check prints it when it fails. */
const changedFile = (count: number) =>
  fc.record({
    file: fc.nat({ max: count - 1 }),
    tensors: tensorChanges,
    header: fc.oneof({ weight: 3, arbitrary: fc.constant([]) }, jsonChanges),
    bytes: fc.oneof({ weight: 5, arbitrary: fc.constant([]) }, byteChanges),
  });
type ChangedFile = ReturnType<typeof changedFile> extends fc.Arbitrary<infer Input> ? Input : never;

function fileOf(lists: readonly TensorList[], { file, tensors, header, bytes }: ChangedFile): Uint8Array {
  const whole = safetensorsFile(changedTensors(lists[file]!, tensors, lists), header);
  return changedBytes(whole, bytes, { fields: [{ offset: 0, bytes: 8 }] });
}

fuzz('safetensors', changedFile(safetensors.length), (input) => {
  const bytes = fileOf(safetensors, input);
  const source = countedSource(bytes);
  return {
    size: bytes.length,
    async read() {
      const file = await openSafetensors(source);
      let end = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
      const wrong = [...file.tensors.values()]
        .sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength)
        .filter(({ dtype, shape, offset, byteLength }) => {
          const follows = offset === end;
          end = offset + byteLength;
          return !follows || elementCount(shape) * bytesPerElement[dtype] !== byteLength;
        });
      expect(wrong).toEqual([]);
      expect(end).toBe(bytes.length);
      let read = 0;
      for (const name of file.tensors.keys()) read += (await readTensor(file, name)).data.byteLength;
      expect(read).toBeLessThan(bytes.length);
      expect(Object.values(file.metadata).every((text) => typeof text === 'string')).toBe(true);
      source.check();
    },
  };
});

const ggufs = [
  fixture('fixtures/gguf/types.gguf'),
  fixture('fixtures/gguf/t5.gguf'),
  ggufFile(transformer),
  ggufFile(part(official, 'text_encoders.t5xxl.')),
].map((bytes) => ({ bytes, fields: ggufFields(bytes) }));

/** A list of tensors as GGUF without metadata; its tensors must be of these types. */
function ggufFile({ tensors }: TensorList): Uint8Array {
  const parts: Buffer[] = [];
  const integer = (value: number, size: 4 | 8) => {
    const bytes = Buffer.alloc(size);
    bytes.writeUInt32LE(value);
    parts.push(bytes);
  };
  const aligned = (bytes: Uint8Array) => Buffer.concat([bytes, Buffer.alloc(-bytes.length & 31)]);
  parts.push(Buffer.from('GGUF'));
  integer(3, 4);
  integer(tensors.length, 8);
  integer(0, 8);
  let end = 0;
  for (const { name, dtype, shape, data } of tensors) {
    const sizes = shape.toReversed();
    integer(name.length, 8);
    parts.push(Buffer.from(name));
    integer(sizes.length, 4);
    for (const size of sizes) integer(size, 8);
    integer({ F32: 0, F16: 1, BF16: 30 }[dtype]!, 4);
    integer(end, 8);
    end += aligned(data).length;
  }
  return Uint8Array.from(Buffer.concat([aligned(Buffer.concat(parts)), ...tensors.map(({ data }) => aligned(data))]));
}

/** Every integer of a GGUF header that counts, measures, places or names a type. */
function ggufFields(bytes: Uint8Array): Field[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const fields: Field[] = [];
  let at = 4;
  const integer = (size: 4 | 8) => {
    fields.push({ offset: at, bytes: size });
    at += size;
    return size === 4 ? view.getUint32(at - 4, true) : Number(view.getBigUint64(at - 8, true));
  };
  const text = () => {
    const length = integer(8);
    at += length;
  };
  const sizes = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
  const value = (type: number) => {
    if (type === 8) text();
    else at += sizes[type]!;
  };
  integer(4);
  const [tensors, entries] = [integer(8), integer(8)];
  for (let i = 0; i < entries; i++) {
    text();
    const type = integer(4);
    if (type !== 9) {
      value(type);
      continue;
    }
    const elements = integer(4);
    for (let count = integer(8); count > 0; count--) value(elements);
  }
  for (let i = 0; i < tensors; i++) {
    text();
    for (let dimensions = integer(4); dimensions > 0; dimensions--) integer(8);
    integer(4);
    integer(8);
  }
  return fields;
}

const changedGguf = fc.record({ file: fc.nat({ max: ggufs.length - 1 }), changes: byteChanges });

fuzz('GGUF', changedGguf, ({ file, changes }) => {
  const { bytes: whole, fields } = ggufs[file]!;
  const bytes = changedBytes(whole, changes, { fields, others: ggufs.map((other) => other.bytes) });
  const source = countedSource(bytes, 'file.gguf');
  return {
    size: bytes.length,
    async read() {
      const gguf = await openGguf(source);
      for (const tensor of gguf.tensors.values()) {
        const { encoding, shape, byteLength } = tensor;
        const { valuesPerBlock, bytesPerBlock } = isBlockType(encoding)
          ? blockFormats[encoding]
          : { valuesPerBlock: 1, bytesPerBlock: bytesPerElement[encoding] };
        const { data } = await readFloats(wholeTensor({ ...gguf, metadata: {} }, tensor));
        const sizes = [elementCount(shape), (byteLength / bytesPerBlock) * valuesPerBlock];
        if (sizes.some((size) => size !== data.length)) expect(sizes).toEqual([data.length, data.length]);
      }
      source.check();
    },
  };
});

/** One file, or a second one beside it. */
const changedModel = fc.record({
  first: changedFile(checkpoints.length),
  gguf: fc.oneof({ weight: 6, arbitrary: fc.constant(null) }, changedGguf),
  second: fc.oneof({ weight: 3, arbitrary: fc.constant(null) }, changedFile(checkpoints.length)),
});

function modelOf({ first, gguf, second }: typeof changedModel extends fc.Arbitrary<infer Input> ? Input : never) {
  const files = [gguf ? ggufBytes(gguf) : fileOf(checkpoints, first), ...(second ? [fileOf(checkpoints, second)] : [])];
  return {
    size: files.reduce((sum, { length }) => sum + length, 0),
    sources: files.map((bytes, i) => countedSource(bytes, `file${i}.safetensors`)),
  };
}

function ggufBytes({
  file,
  changes,
}: typeof changedGguf extends fc.Arbitrary<infer Input> ? Input : never): Uint8Array {
  const { bytes, fields } = ggufs[file]!;
  return changedBytes(bytes, changes, { fields, others: ggufs.map((other) => other.bytes) });
}

fuzz('a checkpoint', changedModel, (input) => {
  const { size, sources } = modelOf(input);
  return {
    size,
    async read() {
      const { parts, files } = await openCheckpoint(sources);
      for (const weights of Object.values(parts)) {
        const sizes = Object.entries<unknown>({ ...weights.config }).filter(([, value]) => typeof value === 'number');
        for (const [name, size] of sizes as [string, number][]) {
          const isSize = Number.isSafeInteger(size) && size > 0;
          if (!isSize && !/Id$|^latentS/.test(name)) expect(`${name} ${size}`).toBe('a size');
          if (name.endsWith('Id')) expect(size).toBeLessThan(Number(Object.fromEntries(sizes).vocabSize));
        }
        for (const [i, weight] of [...weights.tensors.values()].entries()) {
          const { spans, shape } = weight;
          if (spans.length === 0 || Math.min(...shape) < 1) expect([spans.length, ...shape]).toEqual('a weight');
          if (i % 16 === 0) expect((await readWeight(weight)).data.length).toBe(elementCount(shape));
        }
        modelDefaults(weights.metadata, weights.file);
        storedPreviewFactors(weights.metadata, weights.file);
      }
      expect(files.length).toBe(sources.length);
      for (const source of sources) source.check();
    },
  };
});

fuzz('an inspection', changedModel, (input) => {
  const { size, sources } = modelOf(input);
  return {
    size,
    async read() {
      const inspection = await inspectCheckpoint(sources);
      const lines = formatInspection(inspection).split('\n');
      for (const line of lines) expectLine(line);
      expect(lines.length).toBeLessThan(50);
      expect(inspection.unusedTensors).toBeGreaterThanOrEqual(0);
      for (const { parameters, bytes } of inspection.parts) {
        expect(Number.isSafeInteger(parameters) && Number.isSafeInteger(bytes)).toBe(true);
      }
      for (const part of Object.values((await openCheckpoint(sources)).parts)) {
        for (const { count } of await findNonFinite(part)) expect(count).toBeGreaterThan(0);
      }
    },
  };
});

const loraFiles = ['lora_kohya', 'lora_diffusers'].map((name) => listTensors(fixture(`golden/${name}.safetensors`)));
const adapter = {
  lora_adapter_metadata: JSON.stringify({
    'transformer.lora_alpha': 8,
    'transformer.alpha_pattern': { '^attn\\.to_q$': 4, 'attn.to_k': 2 },
    'transformer.use_rslora': true,
    'text_encoder.lora_alpha': 4,
    'text_encoder.alpha_pattern': null,
  }),
};
const loras = loraFiles.flatMap(({ metadata, tensors }) => [
  { metadata, tensors: tensors.filter(({ name }) => /blocks[._]0[._]/.test(name)) },
  { metadata: { ...metadata, ...adapter }, tensors: tensors.filter(({ name }) => /blocks[._]1[._].*attn/.test(name)) },
]);
/** Shapes of the weights that the unchanged files change. */
const shapes = new Map<string, readonly number[]>();
for (const file of loraFiles) {
  const { parts } = await openLora(countedSource(safetensorsFile(file)));
  for (const [name, [change]] of parts.transformer!) shapes.set(name, [change!.outputs, change!.down.shape[1]!]);
}

fuzz('a LoRA', changedFile(loras.length), (input) => {
  const bytes = fileOf(loras, input);
  const source = countedSource(bytes, 'lora.safetensors');
  return {
    size: bytes.length,
    async read() {
      const lora = await openLora(source);
      for (const part of Object.keys(lora.parts) as LoraPart[]) {
        for (const changes of lora.parts[part]!.values()) {
          for (const { down, up, scale, rows, outputs } of changes) {
            expect(Number.isFinite(scale)).toBe(true);
            expect(rows[0]).toBeGreaterThanOrEqual(0);
            expect(rows[1]).toBeLessThanOrEqual(outputs);
            expect(up.shape).toEqual([rows[1] - rows[0], down.shape[0]]);
          }
        }
        combineLoras([{ lora, strength: 1 }], part, shapes);
      }
      source.check();
    },
  };
});
