/** Files that are no Stable Diffusion 3 checkpoint, told by their content and refused by name. */
import { MmditxError } from '../errors.ts';
import { quote } from './quote.ts';

const PICKLE_PROTO = 0x80;

/** A pickle begins with an opcode and its version; a header's length may do so, too, but has zeros behind. */
function isPickle(start: string): boolean {
  const version = start.charCodeAt(1);
  return start.charCodeAt(0) === PICKLE_PROTO && version >= 2 && version <= 5 && !start.startsWith('\0\0\0\0', 4);
}

const formats: { readonly begins: (start: string) => boolean; readonly error: (name: string) => MmditxError }[] = [
  {
    begins: (start) => start.startsWith('GGUF'),
    error: (name) =>
      new MmditxError(
        'unsupported-model',
        `${name} is a GGUF file, which is read for models only; use a .safetensors file.`,
      ),
  },
  {
    // Since PyTorch 1.6 the pickle lies in a zip archive.
    begins: (start) => start.startsWith('PK\u0003\u0004') || isPickle(start),
    error: pickleError,
  },
  {
    begins: (start) => start.startsWith('version https://git-lfs'),
    error: (name) =>
      new MmditxError(
        'bad-file',
        `${name} is only a Git LFS pointer, not the file it stands for; run "git lfs pull" or download the file itself.`,
      ),
  },
  {
    begins: (start) => /^\s*<(!doctype|html|\?xml)/i.test(start),
    error: (name) =>
      new MmditxError(
        'bad-file',
        `${name} is a web page, not a model, perhaps one that asks to log in; download the file again.`,
      ),
  },
  {
    begins: (start) => /^\s*\{\s*"/.test(start),
    error: (name) =>
      new MmditxError('bad-file', `${name} is a JSON text without weights; give the .safetensors file itself.`),
  },
];

/** The error of a file that Python pickled. */
export function pickleError(name: string): MmditxError {
  return new MmditxError(
    'unsupported-model',
    `${name} is a Python pickle or zip archive (.ckpt, .pt, .bin); pickles can run code when opened and are refused; use the model's .safetensors file or convert it.`,
  );
}

/** What a file that is not safetensors is, by its first bytes; undefined where they say nothing. */
export function foreignFileError(name: string, start: Uint8Array): MmditxError | undefined {
  const text = String.fromCharCode(...start);
  return formats.find(({ begins }) => begins(text))?.error(name);
}

/** The first rule one of whose patterns matches a tensor's name decides, so the particular stand before the general. */
const models: { readonly named: RegExp; readonly is: string; readonly remedy?: string }[] = [
  {
    named: /(^|[._])lora_(unet|te\d?|transformer|up|down|A|B)[._]|\.(lora|lokr|hada)_\w+(\.|$)/,
    is: 'holds a LoRA, a change to a model and not a model',
    remedy: 'give the checkpoint it was made for as the model and this file with --lora FILE',
  },
  {
    named: /\.(absmax|quant_map|quant_state\.\w+)$/,
    is: 'holds weights quantised by bitsandbytes, which this version does not read',
    remedy: 'use the fp16 file or a GGUF file',
  },
  { named: /(^|\.)(control_model|controlnet_blocks|controlnet_cond_embedding)\./, is: 'holds a ControlNet' },
  { named: /(^|\.)conditioner\.embedders\.1\.|(^|\.)label_emb\.0\.0\./, is: 'holds Stable Diffusion XL' },
  { named: /(^|\.)input_blocks\.\d+\./, is: 'holds Stable Diffusion 1 or 2' },
  { named: /(^|\.)(double_layers|joint_transformer_blocks)\.\d+\./, is: 'holds AuraFlow' },
  { named: /(^|\.)(double_blocks|single_transformer_blocks)\.\d+\./, is: 'holds FLUX' },
  {
    // The U-Net as diffusers names it.
    named: /\.(attentions\.\d+\.transformer_blocks|time_emb_proj)\./,
    is: 'holds Stable Diffusion 1, 2 or XL',
  },
  { named: /(^|\.)(post_)?quant_conv\.weight$/, is: 'holds the VAE of Stable Diffusion 1, 2 or XL' },
];

/** The error of a model that cannot be run, by its tensors' names; undefined where none gives it away. */
export function foreignModelError(file: string, names: Iterable<string>): MmditxError | undefined {
  const all = [...names];
  for (const { named, is, remedy = 'give a checkpoint of Stable Diffusion 3 or 3.5' } of models) {
    if (all.some((name) => named.test(name))) return new MmditxError('unsupported-model', `${file} ${is}; ${remedy}.`);
  }
  return undefined;
}

/** The error of a file in which no part of the model is found. */
export function unknownModelError(file: string, names: Iterable<string>): MmditxError {
  const examples = [...names].slice(0, 3).map((name) => quote(name));
  const found = examples.length ? `its tensors have names like ${examples.join(', ')}` : 'it holds no tensors';
  return new MmditxError(
    'unsupported-model',
    `${file} holds no part of Stable Diffusion 3 (${found}); give a checkpoint of Stable Diffusion 3 or 3.5.`,
  );
}
