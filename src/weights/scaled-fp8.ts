/**
 * Weights in fp8 with a scale for each ("scaled fp8"), as ComfyUI writes them; the value is the stored one * scale.
 *
 * | tensor | meaning |
 * |---|---|
 * | `X.scale_weight`, in newer files `X.weight_scale` | the scale of `X.weight` |
 * | `X.scale_input`, `X.input_scale` | for products in fp8, which are not computed here |
 * | `scaled_fp8` | marks a network of an older file |
 * | `X.comfy_quant` | JSON as bytes: the format of `X.weight`; the metadata entry `_quantization_metadata` may say it, too |
 */

import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { elementCount } from '../tensor/data.ts';
import { quote } from './quote.ts';
import { readExactly } from './safetensors.ts';
import { readFloats, type StoredTensor, type WeightsFile, type WeightTensor, wholeTensor } from './stored.ts';

/** What stands beside a weight; the group is X. */
const SCALE = /^(.*)\.(?:scale_weight|weight_scale)$/;
const FORMAT = /^(.*)\.comfy_quant$/;
const UNUSED = /(?:^|\.)scaled_fp8$|\.(?:scale_input|input_scale)$/;
/** Further scales, which formats other than fp8 have. */
const OTHER_SCALE = /\.(?:weight_scale_2|pre_quant_scale)$/;

const FORMATS_KEY = '_quantization_metadata';
const formatSchema = z.object({ format: z.string() });
const formatsSchema = z.object({ layers: z.record(z.string(), formatSchema) });
/** Those whose only scale is that of the whole weight. */
const readFormats: readonly string[] = ['float8_e4m3fn', 'float8_e5m2'];

/** More than all networks of a model have layers; each is read by itself. */
const MAX_COMPANIONS = 10_000;
const MAX_FORMAT_BYTES = 4096;

/**
 * The weights of a file by its own names, scales applied.
 * @throws MmditxError `unsupported-model` for scales of rows or blocks and formats other than fp8; `bad-file`
 */
export async function scaledWeights(file: WeightsFile): Promise<Map<string, WeightTensor>> {
  const weights = new Map<string, WeightTensor>();
  const scales: [string, StoredTensor][] = [];
  const formats: StoredTensor[] = [];
  for (const [name, tensor] of file.tensors) {
    const scaled = SCALE.exec(name)?.[1];
    if (OTHER_SCALE.test(name)) throw unsupported(file, 'several scales for a weight');
    if (scaled !== undefined) scales.push([`${scaled}.weight`, tensor]);
    else if (FORMAT.test(name)) formats.push(tensor);
    else if (!UNUSED.test(name)) weights.set(name, wholeTensor(file, tensor));
  }
  if (scales.length + formats.length > MAX_COMPANIONS) {
    throw damaged(file, `it has ${scales.length + formats.length} scales and formats of weights`);
  }
  checkFormats(file, [
    ...statedFormats(file),
    ...(await Promise.all(formats.map((tensor) => readFormat(file, tensor)))),
  ]);
  await Promise.all(
    scales.map(async ([name, tensor]) => {
      const weight = weights.get(name);
      if (!weight) throw damaged(file, `the weight of its scale ${quote(tensor.name)} is missing`);
      const scale = await readScale(file, tensor);
      weights.set(name, { ...weight, spans: weight.spans.map((span) => ({ ...span, scale })) });
    }),
  );
  return weights;
}

async function readScale(file: WeightsFile, tensor: StoredTensor): Promise<number> {
  if (elementCount(tensor.shape) !== 1) throw unsupported(file, 'a scale for each row or block of a weight');
  const [scale] = (await readFloats(wholeTensor(file, tensor))).data;
  if (!Number.isFinite(scale)) throw damaged(file, `its scale ${quote(tensor.name)} is not a finite number`);
  return scale!;
}

async function readFormat(file: WeightsFile, { name, offset, byteLength }: StoredTensor): Promise<string> {
  if (byteLength > MAX_FORMAT_BYTES) throw damaged(file, `its tensor ${quote(name)} is no description of a weight`);
  const bytes = await readExactly(file.source, offset, byteLength);
  return parse(file, name, new TextDecoder().decode(bytes), formatSchema).format;
}

function statedFormats(file: WeightsFile): string[] {
  const text = file.metadata[FORMATS_KEY];
  if (text === undefined) return [];
  return Object.values(parse(file, FORMATS_KEY, text, formatsSchema).layers).map(({ format }) => format);
}

function parse<T>(file: WeightsFile, name: string, text: string, schema: z.ZodType<T>): T {
  try {
    return schema.parse(JSON.parse(text));
  } catch {
    throw damaged(file, `${quote(name)} does not tell the format of its weights`);
  }
}

function checkFormats(file: WeightsFile, formats: readonly string[]): void {
  const unread = formats.find((format) => !readFormats.includes(format));
  if (unread !== undefined) throw unsupported(file, `weights in the format ${quote(unread)}`);
}

function unsupported({ source }: WeightsFile, found: string): MmditxError {
  return new MmditxError(
    'unsupported-model',
    `${source.name} has ${found}, a quantisation this version does not read; use the fp16 file or one in fp8 with a scale for each weight.`,
  );
}

function damaged({ source }: WeightsFile, found: string): MmditxError {
  return new MmditxError('bad-file', `${source.name} cannot be used: ${found}; download it again.`);
}
