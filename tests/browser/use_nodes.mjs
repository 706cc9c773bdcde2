// Use the nodes in the real ComfyUI frontend as people do, and report what they would see.
// usage: node use_nodes.mjs SERVER_URL SCREENSHOT_FOLDER CASES.json
// CASES.json: { run: prompt, cancel: prompt, waitFor: node type whose text is waited for,
// help: [node types], languages: [codes] }
// Prints one JSON object: { run, cancel, labels, help: type -> {...}, languages: code -> {...} }.
import fs from 'node:fs'
import path from 'node:path'
import { loadPrompt, newPage, openFrontend, setSetting, startBrowser } from './frontend.mjs'

const [url, screenshots, file] = process.argv.slice(2)
const cases = JSON.parse(fs.readFileSync(file, 'utf8'))
const shot = (page, name) => page.screenshot({ path: path.join(screenshots, `${name}.png`) })

// Collects what the server tells the frontend while a prompt runs.
async function watch(page) {
  await page.evaluate(() => {
    window.seen = { progress: [], texts: {}, ended: null }
    const note = (kind) => () => (window.seen.ended = window.seen.ended ?? kind)
    for (const kind of ['execution_success', 'execution_interrupted', 'execution_error']) {
      app.api.addEventListener(kind, note(kind))
    }
    app.api.addEventListener('progress', ({ detail }) => window.seen.progress.push([detail.node, detail.value, detail.max]))
    app.api.addEventListener('progress_text', ({ detail }) => {
      const type = app.graph.getNodeById(detail.nodeId)?.type
      if (detail.text) (window.seen.texts[type] ??= []).push(detail.text)
    })
  })
}

async function queue(page, prompt, name) {
  await openFrontend(page, url)
  await loadPrompt(page, prompt, name)
  await watch(page)
  await page.getByTestId('queue-button').click()
}

// What was collected, and the text that stands on each node in the end.
async function seen(page) {
  return page.evaluate(() => {
    const text = (node) => node.widgets?.find((w) => w.name === '$$node-text-preview')?.value
    return { ...window.seen, shown: Object.fromEntries(app.graph.nodes.map((node) => [node.type, text(node)])) }
  })
}

async function started(page, type) {
  await page.waitForFunction(
    (wanted) => Object.keys(window.seen.texts).includes(wanted) && window.seen.progress.length > 2,
    type,
    { timeout: 180000 }
  )
}

// Show a node as large as it is, so that a picture of the page shows what is written on it.
async function lookAt(page, type) {
  await page.evaluate((wanted) => {
    app.canvas.ds.scale = 1
    app.canvas.centerOnNode(app.graph.nodes.find((node) => node.type === wanted))
  }, type)
  await page.waitForTimeout(300)
}

async function ended(page) {
  await page.waitForFunction(() => window.seen.ended, null, { timeout: 300000 })
  await page.waitForTimeout(1000)
}

async function run(page) {
  await queue(page, cases.run, 'run')
  await lookAt(page, cases.waitFor)
  await started(page, cases.waitFor)
  await shot(page, 'use_progress')
  await ended(page)
  await shot(page, 'use_done')
  return seen(page)
}

async function cancel(page) {
  await queue(page, cases.cancel, 'cancel')
  await started(page, cases.waitFor)
  const before = Date.now()
  await page.getByRole('button', { name: 'Cancel current run' }).first().click()
  await page.waitForFunction(() => window.seen.ended, null, { timeout: 60000, polling: 20 })
  const seconds = (Date.now() - before) / 1000
  await lookAt(page, cases.waitFor)
  await shot(page, 'use_cancelled')
  return { ...(await seen(page)), seconds }
}

async function help(page) {
  await openFrontend(page, url)
  const report = {}
  for (const type of cases.help) {
    await page.evaluate((kind) => {
      app.graph.clear()
      const node = LiteGraph.createNode(kind)
      app.graph.add(node)
      node.pos = [100, 200]
      app.canvas.ds.reset()
      app.canvas.selectNode(node)
      app.canvas.setDirty(true, true)
    }, type)
    const button = page.getByTestId('info-button')
    await button.waitFor({ timeout: 20000 })
    await button.click()
    const panel = page.getByTestId('properties-panel')
    await panel.waitFor({ timeout: 20000 })
    await page.waitForFunction(
      () => [...document.querySelectorAll('[data-testid=properties-panel] img')].every((i) => i.complete),
      null,
      { timeout: 20000 }
    )
    await page.waitForTimeout(1000)
    report[type] = await panel.evaluate((element) => ({
      text: element.innerText,
      pictures: [...element.querySelectorAll('img')].map((image) => ({
        source: image.getAttribute('src'),
        text: image.alt,
        width: image.naturalWidth,
        shown: image.getBoundingClientRect().width
      })),
      width: element.getBoundingClientRect().width
    }))
    await shot(page, `help_${type}`)
  }
  return report
}

async function languages(page) {
  const report = {}
  for (const code of cases.languages) {
    await openFrontend(page, url)
    await setSetting(page, 'Comfy.Locale', code)
    await openFrontend(page, url)
    await loadPrompt(page, cases.cancel, code)
    await lookAt(page, cases.waitFor)
    report[code] = await page.evaluate(() =>
      Object.fromEntries(
        app.graph.nodes.map((node) => [
          node.type,
          {
            title: LiteGraph.registered_node_types[node.type].title,
            widgets: (node.widgets ?? []).map((widget) => widget.label ?? widget.name)
          }
        ])
      )
    )
    await shot(page, `language_${code}`)
  }
  await setSetting(page, 'Comfy.Locale', 'en')
  return report
}

// What the picker of engines shows of the engine that the first part has built.
async function labels(page) {
  await openFrontend(page, url)
  const found = await page.evaluate((type) => {
    app.graph.clear()
    const node = LiteGraph.createNode(type)
    app.graph.add(node)
    node.pos = [100, 200]
    node.size[0] = 520
    app.canvas.ds.reset()
    app.canvas.setDirty(true, true)
    const picker = node.widgets.find((widget) => widget.name === 'engine')
    const values = picker.options.values
    const offered = typeof values === 'function' ? values() : values
    return { value: picker.value, labels: offered.map((value) => picker.options.getOptionLabel(value)) }
  }, 'FluxFP4LoadEngine')
  await page.waitForTimeout(500)
  await shot(page, 'use_labels')
  return found
}

const report = {}
for (const [name, part] of Object.entries({ run, cancel, labels, help, languages })) {
  // A browser of its own for each: the frontend opens the workflows of its last page again.
  const browser = await startBrowser()
  report[name] = await part(await newPage(browser)).catch((error) => ({ error: String(error) }))
  await browser.close()
}
console.log(JSON.stringify(report))
