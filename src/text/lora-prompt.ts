/** LoRAs asked for in a prompt, as in stable-diffusion-webui: `a fox, <lora:watercolour:0.8>`. */

import { MmditxError } from '../errors.ts';
import { MAX_LORA_STRENGTH } from '../weights/lora.ts';
import { quote } from '../weights/quote.ts';

/** A LoRA named in a prompt. */
export interface PromptLora {
  /** As written, which may be with spaces and dots; never a path. */
  readonly name: string;
  /** For the transformer. */
  readonly strength: number;
  /** For the text encoders. */
  readonly clipStrength: number;
}

/** Up to the next angle bracket, so that a tag that is not closed does not swallow what follows it. */
const tags = /<lora:([^<>]*)(>?)/gi;

/** A decimal number, maybe with an exponent. */
const decimal = /^[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i;

/**
 * Takes the LoRA tags out of a prompt and leaves the rest as it is, spaces and commas around them included.
 *
 * | tag | text encoders | transformer |
 * |---|---|---|
 * | `<lora:name>` | 1 | 1 |
 * | `<lora:name:0.8>` | 0.8 | 0.8 |
 * | `<lora:name:0.8:0.6>` | 0.8 | 0.6 |
 * | `<lora:name:unet=0.6:te=0.8>` | 0.8 | 0.6 |
 *
 * The order is that of stable-diffusion-webui (`extra_networks_lora.py`: `te_multiplier`, then `unet_multiplier`).
 *
 * @returns the LoRAs in the order of their tags; one named twice is there twice
 * @throws MmditxError `bad-option` for a tag without a name, with a path for a name, or with anything but numbers from
 *   -100 to 100 behind it
 */
export function extractLoras(prompt: string): { prompt: string; loras: PromptLora[] } {
  const loras: PromptLora[] = [];
  const rest = prompt.replace(tags, (tag, content: string, end: string) => {
    const refuse = (found: string) => new MmditxError('bad-option', `${quote(tag)} in the prompt ${found}.`);
    if (end === '') throw refuse('is not closed; write it as <lora:name:0.8>');
    const [name, ...values] = content.split(':').map((part) => part.trim()) as [string, ...string[]];
    if (name === '') throw refuse('names no LoRA; write it as <lora:name:0.8>');
    // biome-ignore lint/suspicious/noControlCharactersInRegex: names must not hold any
    if (/[/\\\u0000-\u001f]/.test(name) || /^\.+$/.test(name)) {
      throw refuse('has a path for a name; give the name of a LoRA alone');
    }

    const positional: number[] = [];
    const named: { te?: number; unet?: number } = {};
    for (const value of values) {
      const [, key, text] = /^(te|unet)\s*=\s*(.*)$/s.exec(value) ?? [undefined, undefined, value];
      const strength = decimal.test(text!) ? Number(text) : Number.NaN;
      if (!(Math.abs(strength) <= MAX_LORA_STRENGTH)) {
        const range = `a number from -${MAX_LORA_STRENGTH} to ${MAX_LORA_STRENGTH}`;
        throw refuse(`has the strength ${quote(text!)}; give ${range}, as in <lora:name:0.8>`);
      }
      if (key === 'te' || key === 'unet') named[key] = strength;
      else positional.push(strength);
    }
    if (positional.length > 2) throw refuse('has more than two strengths; write it as <lora:name:0.8>');
    const clipStrength = named.te ?? positional[0] ?? 1;
    loras.push({ name, strength: named.unet ?? positional[1] ?? clipStrength, clipStrength });
    return '';
  });
  return { prompt: rest, loras };
}
