import { describe, expect, it } from 'vitest';
import { extractLoras } from '../../src/text/lora-prompt.ts';

/** LoRAs as `name|transformer|text encoders`. */
function read(prompt: string): [rest: string, ...loras: string[]] {
  const { prompt: rest, loras } = extractLoras(prompt);
  return [rest, ...loras.map(({ name, strength, clipStrength }) => `${name}|${strength}|${clipStrength}`)];
}

describe('LoRAs in a prompt', () => {
  // What stable-diffusion-webui takes each for, worked out from its rules (text encoders' number first).
  it.each([
    ['', ['']],
    ['a fox', ['a fox']],
    ['a fox <lora:ink>', ['a fox ', 'ink|1|1']],
    ['<lora:ink:0.8>', ['', 'ink|0.8|0.8']],
    ['<lora:ink:0.8:0.6>', ['', 'ink|0.6|0.8']],
    ['<lora:ink:unet=0.6>', ['', 'ink|0.6|1']],
    ['<lora:ink:te=0.8>', ['', 'ink|0.8|0.8']],
    ['<lora:ink:unet=0.6:te=0.8>', ['', 'ink|0.6|0.8']],
    ['<lora:ink:0.5:unet=0>', ['', 'ink|0|0.5']],
    ['<lora:ink:unet=0.3:0.5>', ['', 'ink|0.3|0.5']],
    ['<lora:ink:-1>', ['', 'ink|-1|-1']],
    ['<lora:ink:+.5> <lora:ink:2.> <lora:ink:1e-1>', ['  ', 'ink|0.5|0.5', 'ink|2|2', 'ink|0.1|0.1']],
    ['<lora:ink: 1 >', ['', 'ink|1|1']],
    ['<LoRA:Ink:1>', ['', 'Ink|1|1']],
    ['a, <lora:My style v1.5 (final):0.7>, b', ['a, , b', 'My style v1.5 (final)|0.7|0.7']],
    ['<lora:水彩:1>x', ['x', '水彩|1|1']],
    ['one <lora:a:1> two\n<lora:b:0.5>, three', ['one  two\n, three', 'a|1|1', 'b|0.5|0.5']],
    ['a < b > c <hypernet:x:1> (d:1.2) <lora', ['a < b > c <hypernet:x:1> (d:1.2) <lora']],
  ])('are taken out of %j', (prompt, expected) => {
    expect(read(prompt)).toEqual(expected);
  });

  it.each([
    ['<lora:ink:>', /"<lora:ink:>" in the prompt has the strength ""; give a number from -100 to 100/],
    ['<lora:ink:strong>', /has the strength "strong"/],
    ['<lora:ink:0,8>', /has the strength "0,8"/],
    ['<lora:ink:1:x>', /has the strength "x"/],
    ['<lora:ink:0x10>', /has the strength "0x10"/],
    ['<lora:ink:NaN>', /has the strength "NaN"/],
    ['<lora:ink:Infinity>', /has the strength "Infinity"/],
    ['<lora:ink:1e999>', /has the strength "1e999"/],
    ['<lora:ink:101>', /from -100 to 100/],
    ['<lora:ink:dyn=4>', /has the strength "dyn=4"/],
    ['<lora:ink:te=>', /has the strength ""/],
    ['<lora:ink:1:1:8>', /has more than two strengths/],
    ['<lora:>', /names no LoRA/],
    ['<lora: :1>', /names no LoRA/],
    ['<lora:../../etc/passwd:1>', /has a path for a name/],
    ['<lora:styles\\ink:1>', /has a path for a name/],
    ['<lora:..:1>', /has a path for a name/],
    ['<lora:a\0b:1>', /has a path for a name/],
    ['a fox <lora:ink:1', /"<lora:ink:1" in the prompt is not closed/],
    ['<lora:ink:1, a fox <lora:oil:1>', /is not closed/],
  ])('are refused in %j', (prompt, message) => {
    expect(() => extractLoras(prompt)).toThrow(message);
    expect(() => extractLoras(prompt)).toThrow(expect.objectContaining({ code: 'bad-option' }));
  });

  it('are found quickly in 100,000 hostile characters', () => {
    const started = performance.now();
    for (const prompt of ['<lora'.repeat(2e4), '<'.repeat(1e5), '<lora:x:1>'.repeat(1e4)]) extractLoras(prompt);
    for (const value of ['1'.repeat(1e5), `${'1'.repeat(1e5)}x`, `te=${' '.repeat(1e5)}`, ':'.repeat(1e5)]) {
      expect(() => extractLoras(`<lora:x:${value}>`)).toThrow(/has the strength/);
    }
    expect(performance.now() - started).toBeLessThan(2000);
  });
});
