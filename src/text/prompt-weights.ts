/** Emphasis written into a prompt: `(word:1.2)`, `((word))`, `[word]`, and escapes for brackets that are meant. */
import { MmditxError } from '../errors.ts';

/**
 * How brackets in a prompt are read.
 *
 * | | `comfy` | `a1111` | `none` |
 * |---|---|---|---|
 * | `(word)` | weight x 1.1 | weight x 1.1 | as written |
 * | `(word:1.2)` | weight 1.2, whatever is around it | weight x 1.2 | as written |
 * | `[word]` | as written | weight / 1.1 | as written |
 * | `\(` `\)` | the bracket, as text | the bracket, as text | as written |
 * | `\[` `\]` `\\` | as written | without the first backslash | as written |
 * | unclosed `(` | as written | up to the end of the prompt | as written |
 *
 * `comfy` is what ComfyUI does for SD3 (`sd1_clip.py`, `token_weights`), `a1111` what stable-diffusion-webui does
 * (`prompt_parser.py`, `parse_prompt_attention`), `none` what diffusers does.
 */
export type PromptSyntax = 'comfy' | 'a1111' | 'none';

/** A part of a prompt, without the brackets around it, and the weight of its tokens (1 is neutral). */
export interface PromptSegment {
  readonly text: string;
  readonly weight: number;
}

/** What one pair of round brackets multiplies a weight by. */
const emphasis = 1.1;
/** Far more than anyone writes; keeps the work on a hostile prompt linear in its length. */
const deepestNesting = 100;

/**
 * The segments of a prompt in reading order. Neighbours may have the same weight; empty segments are left out.
 *
 * @param syntax how brackets are read, by default `comfy`
 * @throws MmditxError `bad-option` when brackets are nested deeper than 100
 */
export function parsePromptWeights(prompt: string, syntax: PromptSyntax = 'comfy'): PromptSegment[] {
  switch (syntax) {
    case 'comfy':
      return comfySegments(prompt, 1, 0);
    case 'a1111':
      return a1111Segments(prompt);
    case 'none':
      return prompt === '' ? [] : [{ text: prompt, weight: 1 }];
    default:
      throw new MmditxError('bad-option', `Prompt syntax '${syntax}' is not one of comfy, a1111, none.`);
  }
}

function comfySegments(text: string, weight: number, depth: number): PromptSegment[] {
  if (depth > deepestNesting) throw tooDeep();
  return topLevelParts(text).flatMap((part) => {
    const isGroup = part.length > 1 && part.startsWith('(') && isBracket(part, part.length - 1, ')');
    if (!isGroup) return [{ text: part.replace(/\\([()])/g, '$1'), weight }];
    const content = part.slice(1, -1);
    const colon = content.lastIndexOf(':');
    const ownWeight = parseWeight(content.slice(colon + 1));
    // A weight needs something to weigh: in ComfyUI, "(:1.2)" is text.
    if (colon > 0 && ownWeight !== undefined) return comfySegments(content.slice(0, colon), ownWeight, depth + 1);
    return comfySegments(content, weight * emphasis, depth + 1);
  });
}

/** A decimal number, maybe with an exponent; undefined for anything else and for what is too large to compute with. */
function parseWeight(text: string): number | undefined {
  const weight = /^\s*[+-]?[\d.]+(e[+-]?\d+)?\s*$/i.test(text) ? Number(text) : Number.NaN;
  return Number.isFinite(Math.fround(weight)) ? weight : undefined;
}

/**
 * Splits before and after each outermost pair of round brackets. Brackets that don't match are treated as ComfyUI
 * treats them: an unclosed "(" takes the rest of the text into its part; after a stray ")" the rest is one part.
 */
function topLevelParts(text: string): string[] {
  const parts: string[] = [];
  let start = 0;
  let depth = 0;
  for (let i = 0; i < text.length; i++) {
    if (isBracket(text, i, '(')) {
      if (depth === 0 && i > start) {
        parts.push(text.slice(start, i));
        start = i;
      }
      depth++;
    } else if (isBracket(text, i, ')')) {
      depth--;
      if (depth === 0) {
        parts.push(text.slice(start, i + 1));
        start = i + 1;
      }
    }
  }
  if (start < text.length) parts.push(text.slice(start));
  return parts;
}

function isBracket(text: string, index: number, bracket: string): boolean {
  return text[index] === bracket && text[index - 1] !== '\\';
}

/** An escape, an opening bracket, a weight with its closing bracket, a closing bracket, or text. */
const a1111Token = /\\[\\()[\]]?|[([]|:\s*([+-]?[\d.]+)\s*\)|[)\]]|[^\\()[\]:]+|:/g;

function a1111Segments(prompt: string): PromptSegment[] {
  const segments: { text: string; weight: number }[] = [];
  // For each open bracket, the number of segments before it.
  const round: number[] = [];
  const square: number[] = [];
  const close = (first: number, factor: number) => {
    for (let i = first; i < segments.length; i++) segments[i]!.weight *= factor;
  };
  for (const [token, suffix] of prompt.matchAll(a1111Token)) {
    const weight = suffix === undefined ? undefined : parseWeight(suffix);
    if (round.length + square.length > deepestNesting) throw tooDeep();
    if (token.startsWith('\\')) segments.push({ text: token.slice(1), weight: 1 });
    else if (token === '(') round.push(segments.length);
    else if (token === '[') square.push(segments.length);
    else if (weight !== undefined && round.length > 0) close(round.pop()!, weight);
    else if (token === ')' && round.length > 0) close(round.pop()!, emphasis);
    else if (token === ']' && square.length > 0) close(square.pop()!, 1 / emphasis);
    else segments.push({ text: token, weight: 1 });
  }
  for (const first of round) close(first, emphasis);
  for (const first of square) close(first, 1 / emphasis);
  return joinEqualWeights(segments);
}

function joinEqualWeights(segments: readonly PromptSegment[]): PromptSegment[] {
  const joined: { text: string; weight: number }[] = [];
  for (const { text, weight } of segments) {
    const last = joined.at(-1);
    if (last?.weight === weight) last.text += text;
    else if (text !== '') joined.push({ text, weight });
  }
  return joined;
}

function tooDeep(): MmditxError {
  return new MmditxError(
    'bad-option',
    `The prompt's brackets are nested deeper than ${deepestNesting}; escape those that are meant as text, like "\\(".`,
  );
}
