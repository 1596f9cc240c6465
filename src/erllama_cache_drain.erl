%% Ends the application only when the saves that nobody waits for have ended, or have had their
%% time.
%%
%% Inside erllama the writer is stopped with erllama, and gives these saves a few seconds. This
%% application stops later, and this server waits for the rest.
%%
%% @private
-module(erllama_cache_drain).
-behaviour(gen_server).

-include("erllama_cache_log.hrl").

-export([start_link/0, child_spec/0]).
-export([init/1, handle_call/3, handle_cast/2, terminate/2]).

-spec child_spec() -> supervisor:child_spec().
child_spec() ->
    %% It knows itself how long it waits.
    #{id => ?MODULE, start => {?MODULE, start_link, []}, shutdown => infinity}.

-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    gen_server:start_link(?MODULE, [], []).

%% @private
init([]) ->
    process_flag(trap_exit, true),
    {ok, none}.

%% @private
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

%% @private
handle_cast(_Request, State) ->
    {noreply, State}.

%% @private
terminate(_Reason, _State) ->
    case erllama_cache_pending:flush(drain_ms()) of
        ok ->
            ok;
        {error, {pending, N}} ->
            #{pending_bytes := Bytes} = erllama_cache_pending:info(),
            ?LOG_ERROR(#{event => saves_left, saves => N, pending_bytes => Bytes}, ?LOG_META)
    end.

drain_ms() ->
    case erllama_cache_setup:find() of
        {ok, #{drain_ms := Ms}} -> Ms;
        %% Nothing was ever saved.
        error -> 0
    end.
